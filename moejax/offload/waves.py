"""Demand path: compute with what is cached while the first missing expert travels, and so on.

One layer call wants some experts. They are put in processing order, cached ones first, and served
in waves: wave 0 computes all cached experts, wave i the i-th missing one. The transfer of the next
missing expert starts before a wave computes and lands after it, so link and compute overlap, and
any number of missing experts passes through any number of slots. With everything cached there is
one wave and no loop iteration.

Where link and compute are one processor (CPU) nothing overlaps, and a wave per expert would only
cost: missing experts land one after the other as long as slots are free, and *join* wave 0.

When the layer wants more experts than it has slots, some that were prefetched find no room. These
*late* experts stay in their landing buffers until the slots have been computed, take any of them
but the last missing expert's, and join the last wave: no transfer, no wave of their own.

Write phase before read phase: the landed expert enters the cache at the start of an iteration and
the cache is only read after that. XLA:CPU would copy the whole cache otherwise.

Axis letters:
    T  tokens    K  experts per token    M  rows, T * K    D  model dim
    E  experts of this rank    N  granules    S  rows of the largest chunk
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from moejax.core.structs import Routing
from moejax.kernels.chunks import ChunkPlan, pick_sizes, plan_chunks, zero_tail
from moejax.kernels.grouped_ffn import run_chunks
from moejax.kernels.permute import Permutation, permute, sort_by_group, ungroup
from moejax.kernels.rows import pad_rows
from moejax.kernels.vma import vary_together
from moejax.offload.policies import Policy
from moejax.offload.slots import (
    SlotCache,
    assign,
    choose_slot,
    layer_slot_of,
    write_row,
)
from moejax.offload.source import Source
from moejax.offload.work import Work, last_wave_bounds, num_joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One layer call, ready to be served in waves."""

    source: Source
    xs: jax.Array  # [M + S, D] rows in processing order, padded as `run_chunks` wants
    work: Work
    plan: ChunkPlan  # groups in processing order
    permutation: Permutation
    policy: Policy
    sizes: tuple[int, ...]
    top_k: int


def plan_call(
    x: jax.Array, routing: Routing, work: Work, *, source: Source, policy: Policy
) -> Call:
    """Sorts the rows of x [T, D] by expert in processing order and cuts them into chunks.

    `routing` names experts of this rank, E for assignments that others serve.
    """
    top_k, num_rows = routing.topk_idx.shape[1], routing.topk_idx.size
    num_experts, sizes = work.wanted.shape[0], pick_sizes(num_rows)
    with jax.named_scope("moe_permute"):
        permutation = sort_by_group(routing.topk_idx, num_experts, group_order=work.order)
        return Call(
            source=source,
            xs=pad_rows(permute(x, permutation, top_k), num_rows + sizes[-1]),
            work=work,
            plan=plan_chunks(permutation.group_sizes, sizes=sizes, num_rows=num_rows),
            permutation=permutation,
            policy=policy,
            sizes=sizes,
            top_k=top_k,
        )


def run_missing(call: Call, cache: SlotCache) -> tuple[SlotCache, jax.Array]:
    """Fetches every expert that is to be moved and runs all waves but the last.

    Returns the cache, with the last missing expert landed, and outputs shaped like `xs`. After
    this and before `run_last`, late experts enter the cache in place of any that are not
    `last_wave`, and what should travel behind the demand transfers is started.
    Cost: `work.num_moved` transfers of one expert.
    """
    with jax.named_scope("moe_waves"):
        y, _ = vary_together(jnp.zeros_like(call.xs), cache)
        operands = (call.source, call.xs, _announced(call), call.plan, cache, y)
        return jax.lax.platform_dependent(
            *operands, cpu=partial(_in_turn, call), default=partial(_overlapped, call)
        )


def _overlapped(call, source, xs, work, plan, cache, y):
    """The transfer of the next missing expert starts before a wave and lands after it."""
    call = dataclasses.replace(call, source=source, xs=xs, work=work, plan=plan)
    if work.num_full is None:
        return _waves(call, cache, y, 0, work.num_moved)
    cache, y = _waves(call, cache, y, 0, work.num_full)
    return _waves(call, cache, y, work.num_full, work.num_moved, low=True)


def _waves(call, cache, y, begin, n, *, low=False):
    """Fetches missing experts [begin, n) and computes what was there before each.

    A precision has a loop of its own: a choice within one would be a transfer under a condition,
    which compilers do not overlap (`prefetch.choose`).
    """
    work, source = call.work, call.source

    def wave(i: jax.Array, carry):
        y, cache, landed = carry
        # At first nothing has landed: a loop of no trips, since a cond would copy the cache.
        landing = jnp.minimum(i - begin, 1)
        cache = jax.lax.fori_loop(
            0, landing, lambda _, c: _land(call, c, i - 1, landed, low=low), cache
        )
        coming = _fetch(call, i, low=low)
        missing = work.num_cached + i
        first = jnp.where(i == 0, 0, missing - 1)
        return _compute(call, y, cache, first, missing), cache, coming

    like = jax.eval_shape(source.fetch_low if low else source.fetch, n)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    nothing, _ = vary_together(nothing, cache)
    y, cache, landed = jax.lax.fori_loop(begin, n, wave, (y, cache, nothing))
    last = jnp.minimum(n - begin, 1)
    cache = jax.lax.fori_loop(0, last, lambda _, c: _land(call, c, n - 1, landed, low=low), cache)
    return cache, y


def _in_turn(call, source, xs, work, plan, cache, y):
    """The same where link and compute are one processor: straight into the slot, one copy less."""
    call = dataclasses.replace(call, source=source, xs=xs, work=work, plan=plan)
    n, joined = work.num_moved, num_joined(work)

    cache = jax.lax.fori_loop(0, joined, partial(_bring, call), cache)
    y = _compute(call, y, cache, 0, jnp.where(n == joined, 0, work.num_cached + joined))

    def wave(i: jax.Array, carry):
        y, cache = carry
        cache = _bring(call, i, cache)
        missing = work.num_cached + i
        # The last one's rows are left to `run_last`.
        end = jnp.where(i == n - 1, missing, missing + 1)
        return _compute(call, y, cache, missing, end), cache

    y, cache = jax.lax.fori_loop(joined, n, wave, (y, cache))
    return cache, y


def run_last(call: Call, cache: SlotCache, y: jax.Array) -> jax.Array:
    """The last wave: the last missing expert, or wave 0 where no other is left.

    Late experts come with it.
    """
    with jax.named_scope("moe_last_wave"):
        return _compute(call, y, cache, *last_wave_bounds(call.work))


def unpermute(call: Call, y: jax.Array) -> jax.Array:
    """Outputs [M + S, D] in processing order -> [T, K, D]; zero where this rank has no expert."""
    with jax.named_scope("moe_unpermute"):
        y = zero_tail(y, jnp.sum(call.permutation.group_sizes), sizes=call.sizes)
        return ungroup(y[: y.shape[0] - call.sizes[-1]], call.permutation, call.top_k)


def _compute(call, y, cache, first, last):
    """Runs the chunks of the experts at positions [first, last) of the processing order."""
    work, plan = call.work, call.plan
    slots = layer_slot_of(cache.table, work.layer, work.wanted.shape[0])[work.order]
    begin, end = plan.first_chunk[first], plan.first_chunk[last]
    return run_chunks(y, call.xs, cache.rows, slots, plan, begin, end, sizes=call.sizes)


def _announced(call):
    """`call.work`, of which the source knows what it will be asked for, if more than one."""
    work = call.work
    start = work.layer * work.wanted.shape[0]
    position = jnp.arange(work.order.shape[0], dtype=jnp.int32) - work.num_cached
    live = (position >= 0) & (position < work.num_moved) & (work.num_moved > 1)
    order = call.source.announce(start + work.order, live) - start
    return dataclasses.replace(work, order=order)


def _bring(call, i, cache):
    """The i-th missing expert from its source into its slot, in the precision that it is due."""
    if call.work.num_full is None:
        return _land(call, cache, i, _fetch(call, i))

    def bring(low: bool):
        # What is the same in every trip would be fetched before the loop, whether there is one.
        return lambda trip, c: _land(call, c, i, _fetch(call, i + trip, low=low), low=low)

    in_full = (i < call.work.num_full).astype(jnp.int32)
    cache = jax.lax.fori_loop(0, in_full, bring(False), cache)
    return jax.lax.fori_loop(0, 1 - in_full, bring(True), cache)


def _fetch(call, i, *, low=False):
    """The i-th missing expert, on its way, as the source has it."""
    fetch = call.source.fetch_low if low else call.source.fetch
    return fetch(_granule(call.work, call.work.num_cached + i))


def _granule(work, position):
    return work.layer * work.wanted.shape[0] + work.order[position]


def _land(call, cache, i, expert, *, low=False):
    """The i-th missing expert enters the cache, in the dtype of the slots."""
    work = call.work
    slot, _ = choose_slot(cache.table, work.layer, call.policy, work.wanted)
    table = assign(cache.table, slot, _granule(work, work.num_cached + i), low=low)
    expert = call.source.widen(expert) if low else expert
    return SlotCache(table=table, rows=write_row(cache.rows, slot, expert))
