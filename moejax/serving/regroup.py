"""Sequences change places between two sessions: ExpertFlow's KV merge and reindex.

`moejax.predictors.grouping` says who should sit beside whom; here the rows of everything that
belongs to a sequence move: keys, values, lengths, newest tokens, what the predictor knows of it.
Slot caches belong to the session and stay.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import check
from moejax.serving.engine import Engine
from moejax.serving.programs import Session


def regroup(
    engine: Engine, first: Session, second: Session, order: np.ndarray
) -> tuple[Session, Session]:
    """Deals the sequences of two sessions of B into two others, which replace them.

    Args:
        order: int [2 B], a permutation of the first session's rows 0 .. B - 1 and the second's
            B .. 2 B - 1; its first half goes to the first session.

    Greedy decoding gives every sequence the tokens that it would have had. Sampled tokens are drawn
    by row, so there they are others of the same distribution. Cost: one copy of both KV caches.
    """
    batch, other = len(first.token), len(second.token)
    check(batch == other, f"sessions of {batch} and {other} sequences cannot change places")
    check(
        np.array_equal(np.sort(order), np.arange(2 * batch)),
        f"order is not a permutation of {2 * batch} sequences",
    )
    axes = _batch_axes(engine, batch)
    return _deal(first, second, jnp.asarray(order, jnp.int32).reshape(2, batch), axes)


def _batch_axes(engine: Engine, batch: int) -> tuple[int, ...]:
    """For every leaf of a session the axis that its sequences lie along, -1 where there is none.

    It is the one that grows with the batch, whatever predictor the session carries.
    """

    def shapes(batch: int) -> list[Any]:
        start = partial(engine.programs.start, batch=batch, seed=0, temperature=0.0)
        return jax.tree.leaves(jax.eval_shape(start, engine.predictor))

    def axis(now: Any, grown: Any) -> int:
        differs = [i for i, (a, b) in enumerate(zip(now.shape, grown.shape, strict=True)) if a != b]
        return differs[0] if differs else -1

    return tuple(map(axis, shapes(batch), shapes(batch + 1)))


@partial(jax.jit, static_argnums=3)
def _deal(
    first: Session, second: Session, order: jax.Array, axes: tuple[int, ...]
) -> tuple[Session, Session]:
    def deal(a: jax.Array, b: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        if axis < 0:
            return a, b
        both = jnp.concatenate([a, b], axis)
        return jnp.take(both, order[0], axis), jnp.take(both, order[1], axis)

    structure = jax.tree.structure(first)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), axes, strict=True)
    dealt = [deal(*leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, [leaf[i] for leaf in dealt]) for i in range(2))
