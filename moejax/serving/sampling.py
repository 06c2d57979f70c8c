"""The next token from logits: greedy, or sampled at a temperature from the nucleus.

Axis letters:
    B  batch    V  vocabulary
"""

import jax
import jax.numpy as jnp


def next_token(
    key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """int32 [B] of float32 `logits` [B, V]; a temperature of 0 takes the best.

    Sampling is from the smallest set of tokens whose probability reaches `top_p` (nucleus
    sampling, arXiv 1904.09751, section 3.1). Cost: one sort of [B, V] where it samples.
    """

    def sample() -> jax.Array:
        scaled = logits / temperature
        return jax.random.categorical(key, nucleus(scaled, top_p), axis=-1)

    def best() -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return jax.lax.cond(temperature > 0, sample, best).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """`logits` [B, V] with minus infinity outside the nucleus; all of them for `top_p` 1."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # the mass of better tokens
    inside = (before < top_p) | (top_p >= 1.0)
    # The best token is inside whatever rounding does.
    last = jnp.maximum(inside.sum(-1, keepdims=True) - 1, 0)
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
