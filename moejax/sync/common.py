"""A synchronous start: workers are one run for some steps, and follow their plan from there.

Local methods fall behind where gradients are mostly noise and weights far from good; begun from
trained weights they do not (post-local SGD, arXiv 1808.07217; DiLoCo, arXiv 2311.08105, 3.1).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from moejax.core.errors import check
from moejax.kernels.vma import vary_together
from moejax.sync.exchange import Exchange
from moejax.sync.transform import reduce_gradients


@struct.dataclass(kw_only=True)
class CommonState:
    """Steps taken, and the state of what comes after the start."""

    count: jax.Array  # int32 []
    inner: Any


def after_common_steps(exchange: Exchange, steps: int, axes: tuple[str, ...]) -> Exchange:
    """The exchange, after `steps` in which workers have the mean of their gradients.

    When the start ends, the state of the plan is that of a run which begins with these weights.
    Cost: gradients in full in these steps; nothing after.
    """
    check(steps >= 1, f"steps={steps} must be at least 1")
    return Exchange(
        gradients=_switched(reduce_gradients(axes), exchange.gradients, steps, fresh=False),
        weights=_switched(optax.identity(), exchange.weights, steps, fresh=True),
    )


def _switched(
    start: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    steps: int,
    *,
    fresh: bool,
) -> optax.GradientTransformation:
    """`start`, which has no state, for some steps, then `rest`.

    With `fresh`, `rest` begins from the weights with which `start` ends.
    """

    def init(params: Any) -> Any:
        return CommonState(count=jnp.int32(0), inner=rest.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def first(updates, inner, params):
            new = start.update(updates, optax.EmptyState(), params)[0]
            begun = rest.init(optax.apply_updates(params, new)) if fresh else inner
            return _like(updates, new), _like(inner, begun)

        operands = updates, state.inner, params
        new, inner = lax.cond(state.count < steps, first, rest.update, *operands)
        return new, CommonState(count=state.count + 1, inner=inner)

    return optax.GradientTransformation(init, update)


def _like(old: Any, new: Any) -> Any:
    """The new leaves, varying over the mesh axes over which the old ones do."""
    return jax.tree.map(lambda a, b: vary_together(a, b)[1], old, new)
