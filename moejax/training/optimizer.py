"""AdamW with clipping (arXiv 1711.05101); its learning rate follows the share of the run done.

The learning rate is a function of progress in [0, 1], not of a step count inside the optimizer, so
that the caller may measure progress in seconds.
"""

import jax
import jax.numpy as jnp
import optax

from moejax.training.config import TrainConfig


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Everything but the learning rate: its updates are to be scaled by -lr."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
    )


def learning_rate(progress: jax.Array, cfg: TrainConfig) -> jax.Array:
    """float32 [] at `progress` of the run: linear warm-up, then a cosine to `final_fraction`."""
    warmup, final = cfg.warmup_fraction, cfg.final_fraction
    rise = progress / warmup if warmup else jnp.float32(1)
    fall = jnp.clip((progress - warmup) / (1 - warmup), 0, 1)
    cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * fall))
    return cfg.learning_rate * jnp.minimum(rise, cosine)


def decayed(params: optax.Params) -> optax.Params:
    """True for matrices; norms, biases and temperatures keep their scale.

    By name, because layers are stacked: the norms of a group are [L, D].
    """

    def is_matrix(path: tuple, leaf: jax.Array) -> bool:
        del leaf
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name == "embed" or name.startswith("w_")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
