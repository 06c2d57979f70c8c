"""The sparse mixer of Phi-3.5-MoE (arXiv 2409.12136, section 2.2), as it chooses at inference.

Experts are taken one after the other, best first. The weight of each is its share among those that
come close to it: a softmax over the experts that are left and whose logit lies within a threshold
of the best one, relative to the larger of the two. Most tokens have no close second and get weights
near one, so the weights of a token do not sum to one.

Axis letters:
    T  tokens    E  experts    K  experts per token
"""

import jax
import jax.numpy as jnp


def sparse_mixer(
    logits: jax.Array, top_k: int, threshold: float, forced_idx: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Expert ids int32 [T, K] and weights float32 [T, K] of float32 `logits` [T, E].

    `forced_idx` int32 [T, K] replays a choice; an id of E (a padded token) weighs nothing.
    """
    experts = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    left, ids, weights = logits, [], []
    for k in range(top_k):
        best = left.max(-1, keepdims=True)
        idx = (
            jnp.argmax(left, axis=-1).astype(jnp.int32) if forced_idx is None else forced_idx[:, k]
        )
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * threshold
        share = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        taken = experts == idx[:, None]
        ids.append(idx)
        weights.append(jnp.where(taken, share, 0.0).sum(-1))
        left = jnp.where(taken, -jnp.inf, left)
    return jnp.stack(ids, 1), jnp.stack(weights, 1)
