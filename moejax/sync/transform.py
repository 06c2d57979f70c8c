"""A sync plan as an optax transformation, the last of a chain; and its gradients-only counterpart.

    tx = optax.chain(optax.adamw(1e-3), synchronise(diloco(16), whole(params), ("data",)))

`update` runs inside `shard_map`, each worker with weights and state of its own: give every leaf of
both a leading axis of workers, sharded over the synchronised axes. Weights that are sharded over
other axes, experts over `expert`, are averaged over their replicas only.

After a synchronisation without `keep_local` and overlap all workers hold the target up to the
rounding of p + (target - p); outer weights are the same bits on all of them, always.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from moejax.collectives.schedule import Codec
from moejax.core.errors import check
from moejax.sync.fragments import Fragment, by_axes, check_fragments, put, size, take, whole
from moejax.sync.plan import SyncPlan
from moejax.sync.reduce import Reducer, coded_sum, plain_sum, sent_bytes


@struct.dataclass(kw_only=True)
class SyncState:
    """State of a plan; trees like the weights in float32, None where the plan wants none."""

    count: jax.Array  # int32 [], steps
    outer: Any
    momentum: Any
    residual: Any


def synchronise(
    plan: SyncPlan, fragments: Sequence[Fragment], axes: tuple[str, ...]
) -> optax.GradientTransformation:
    """Final updates to those that follow the plan; see `moejax.sync.plan` for what it does.

    Raises `InputError` when plan and fragments do not match, and when some weight is in none.
    """
    fragments = tuple(fragments)
    check(
        len(fragments) == plan.num_fragments,
        f"the plan has {plan.num_fragments} fragments, the weights {len(fragments)}",
    )

    def init(params: Any) -> Any:
        check_fragments(params, fragments)
        copy = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        zeros = jax.tree.map(jnp.zeros_like, copy)
        return SyncState(
            count=jnp.int32(0),
            outer=copy if plan.outer else None,
            momentum=zeros if plan.outer and plan.outer.momentum else None,
            residual=zeros if plan.codec and plan.feedback else None,
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        check(params is not None, "a sync plan wants the weights: update(updates, state, params)")
        due = [plan.due(step) for step in range(plan.period)]
        kinds = sorted(set(due))
        branches = [partial(_step, plan, [fragments[f] for f in kind], axes) for kind in kinds]
        which = jnp.array([kinds.index(kind) for kind in due], jnp.int32)
        with jax.named_scope("synchronise"):
            branch = which[state.count % plan.period]
            operands = updates, state, params
            if len(branches) == 1:
                return branches[0](*operands)
            return lax.switch(branch, branches, *operands)

    return optax.GradientTransformation(init, update)


def _step(
    plan: SyncPlan,
    fragments: Sequence[Fragment],
    axes: tuple[str, ...],
    updates: Any,
    state: SyncState,
    params: Any,
) -> tuple[Any, SyncState]:
    """One step with these fragments due."""
    treedef = jax.tree.structure(params)
    trees = {
        "params": params,
        "updates": updates,
        "outer": state.outer,
        "momentum": state.momentum,
        "residual": state.residual,
    }
    leaves = {k: jax.tree.leaves(tree) for k, tree in trees.items() if tree is not None}
    for fragment in (part for one in fragments for part in by_axes(leaves["params"], one)):
        vectors = {k: take(tree, fragment) for k, tree in leaves.items()}
        changed = _synchronise(plan, axes, state.count, vectors)
        for name, vector in changed.items():
            leaves[name] = put(leaves[name], fragment, vector)
    new = {name: treedef.unflatten(tree) for name, tree in leaves.items()}
    return new["updates"], SyncState(
        count=state.count + 1,
        outer=new.get("outer"),
        momentum=new.get("momentum"),
        residual=new.get("residual"),
    )


def _synchronise(
    plan: SyncPlan, axes: tuple[str, ...], count: jax.Array, v: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """New vectors of one fragment, by name."""
    workers = lax.axis_size(axes)
    base = v["params"] if plan.overlap else v["params"] + v["updates"]
    rest = v["updates"] if plan.overlap else jnp.zeros_like(base)
    changed: dict[str, jax.Array] = {}
    if plan.outer is None:
        target = plain_sum(axes)(base)[0] / workers
    else:
        movement = v["outer"] - base
        if plan.codec is None:
            total = plain_sum(axes)(movement)[0]
        else:
            wanted = movement + v["residual"] if plan.feedback else movement
            total, sent = _coded(plan, axes, count)(wanted)
            if plan.feedback:
                changed["residual"] = wanted - sent
        step = total / workers
        if plan.outer.momentum:
            # Nesterov's: look ahead along the new momentum.
            changed["momentum"] = plan.outer.momentum * v["momentum"] + step
            step = step + plan.outer.momentum * changed["momentum"]
        target = changed["outer"] = v["outer"] - plan.outer.learning_rate * step
    mixed = plan.keep_local * base + (1 - plan.keep_local) * target if plan.keep_local else target
    changed["updates"] = mixed - v["params"] + rest
    return changed


def _coded(plan: SyncPlan, axes: tuple[str, ...], count: jax.Array) -> Reducer:
    """The plan's reduction, exact in the first of every k synchronisations."""
    coded, plain = coded_sum(axes, plan.codec), plain_sum(axes)
    if plan.exact_every is None:
        return coded
    period = plan.exact_every * plan.period
    return lambda x: lax.cond(count % period < plan.period, plain, coded, x)


def bytes_per_step(
    plan: SyncPlan, fragments: Sequence[Fragment], params: Any, workers: int
) -> float:
    """Bytes that each worker sends per step, on average over a period and its exact steps."""
    exact = 0.0 if plan.codec else 1.0
    if plan.exact_every is not None:
        exact = 1 / plan.exact_every
    total = 0.0
    for fragment, steps in zip(fragments, plan.when, strict=True):
        n = size(params, fragment)
        total += len(steps) * exact * sent_bytes(n, workers)
        if plan.codec:
            total += len(steps) * (1 - exact) * sent_bytes(n, workers, plan.codec)
    return total / plan.period


def reduce_gradients(
    axes: tuple[str, ...], codec: Codec | None = None, feedback: bool = True
) -> optax.GradientTransformation:
    """Gradients of this worker to their mean over workers: the first of a chain.

    What a codec leaves out is added to the next gradients; the state is the tree of it in float32,
    this worker's own, None without feedback or codec.
    """
    reducer, keeps = coded_sum(axes, codec), codec is not None and feedback

    def init(params: Any) -> Any:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return zeros if keeps else None

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        (everything,) = whole(updates)
        residuals = jax.tree.leaves(state)
        for part in by_axes(leaves, everything):
            wanted = take(leaves, part)
            if keeps:
                wanted = wanted + take(residuals, part)
            with jax.named_scope("reduce_gradients"):
                total, sent = reducer(wanted)
            leaves = put(leaves, part, total / lax.axis_size(axes))
            if keeps:
                residuals = put(residuals, part, wanted - sent)
        return treedef.unflatten(leaves), treedef.unflatten(residuals) if keeps else state

    return optax.GradientTransformation(init, update)
