"""The norm of gradients whose experts have copies, and clipping by it.

Copies of an expert all hold the gradient of the expert (`moejax.dispatch.tie`). The norm counts it
once, so that a model is clipped as it would be without copies, whatever the placement.

Axis letters:
    L  MoE layers of a group    P  physical slots
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.core.structs import ExpertPlacement
from moejax.dispatch.relocate import expert_leaves


def logical_norm(grads: Any, placement: ExpertPlacement) -> jax.Array:
    """float32 []: global norm of gradients with experts [L, P, ...], every expert counted once."""
    leaves = jax.tree.leaves(grads)
    squares = [jnp.square(leaf.astype(jnp.float32)) for leaf in leaves]
    slots, counts = (jnp.asarray(x) for x in (placement.phys_to_log, placement.num_replicas))
    share = 1 / jnp.take_along_axis(counts, slots, axis=-1).astype(jnp.float32)  # [P] or [L, P]
    for first, positions in expert_leaves(grads):
        depth = leaves[positions[0]].shape[0]
        here = share[None] if share.ndim == 1 else share[first : first + depth]
        for i in positions:
            squares[i] = here * squares[i].sum(tuple(range(2, squares[i].ndim)))
    return jnp.sqrt(sum((square.sum() for square in squares), jnp.float32(0)))


def clip_by_logical_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`; with `placement` given to `update`, by `logical_norm`.

    >>> clip_by_logical_norm(1.0).init({"w": jnp.ones(3)})
    EmptyState()
    """
    plain = optax.clip_by_global_norm(max_norm)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        placement: ExpertPlacement | None = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        del others  # those of other members of a chain
        if placement is None:
            return plain.update(updates, state, params)
        norm = logical_norm(updates, placement)
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(plain.init, update)
