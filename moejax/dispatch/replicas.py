"""Replica policies: which copy of an expert serves an assignment.

A policy turns logical ids into slots of an `ExpertPlacement`. None of them changes an output, only
how busy the ranks are: with tokens (`round_robin`, `local_first`, `least_tokens`), or, where
reading weights is what takes time, with distinct experts (`aebs`).

Axis letters:
    T  tokens of this rank    K  experts per token    E  experts    P  physical slots
    R  ranks that slots are spread over    C  columns of the table of slots
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.core.structs import ExpertPlacement
from moejax.dispatch.ranks import Axis
from moejax.kernels.permute import sort_by_group


class Policy(Protocol):
    """Chooses copies.

    Args:
        topk_idx: int32 [T, K], logical ids; E for none.
        placement: of one layer.
        ranks: R.
        axis: mesh axis that both tokens and slots are sharded over, inside `shard_map`; None where
            one caller has all the tokens (and every rank may be that caller: the result is the
            same).

    Returns: int32 [T, K] slots; P for none.
    """

    def __call__(
        self, topk_idx: jax.Array, placement: ExpertPlacement, *, ranks: int, axis: Axis | None
    ) -> jax.Array: ...


def round_robin(
    topk_idx: jax.Array, placement: ExpertPlacement, *, ranks: int, axis: Axis | None = None
) -> jax.Array:
    """Copies in turn: token t of rank r takes copy (t + r) mod n. No communication, no sort."""
    del ranks
    counts = jnp.append(jnp.asarray(placement.num_replicas), jnp.int32(1))
    turn = jnp.arange(topk_idx.shape[0], dtype=jnp.int32)[:, None] + _rank(axis)
    return _slots(placement, topk_idx, turn % counts[topk_idx])


def local_first(
    topk_idx: jax.Array, placement: ExpertPlacement, *, ranks: int, axis: Axis | None
) -> jax.Array:
    """The copy on the token's own rank where there is one, else in turn. No communication.

    The least traffic, and loads as uneven as the tokens of the ranks are (Hecate, 2502.02581).
    """
    check(axis is not None, "local_first wants the axis that tokens are sharded over")
    here = _hosts(placement, ranks) == _rank(axis)  # [E, C]
    has_copy = jnp.append(here.any(1), False)[topk_idx]
    column = jnp.append(jnp.argmax(here, 1).astype(jnp.int32), jnp.int32(0))[topk_idx]
    own = _slots(placement, topk_idx, column)
    return jnp.where(has_copy, own, round_robin(topk_idx, placement, ranks=ranks, axis=axis))


def least_tokens(
    topk_idx: jax.Array, placement: ExpertPlacement, *, ranks: int, axis: Axis | None = None
) -> jax.Array:
    """Tokens of every copied expert poured to where the fewest are: loads level out.

    Experts with one copy are counted first; the others follow in ascending id, each spread over
    its copies so that the ranks that hold them, different ones, rise to one level. Cost: an
    all-gather of E counts, a sort of T * K ids, a scan over E.
    """
    sizes = sort_by_group(topk_idx, placement.num_experts).group_sizes
    before, total = _over_ranks(sizes, axis)
    hosts = _hosts(placement, ranks)
    copied = jnp.asarray(placement.num_replicas) > 1
    alone = jnp.where(copied, 0, total)
    load = jnp.zeros((ranks,), jnp.int32).at[hosts[:, 0]].add(alone)

    def pour(load: jax.Array, step: tuple) -> tuple[jax.Array, jax.Array]:
        host, count, copied = step
        poured = _fill(load.at[host].get(mode="fill", fill_value=0), host < ranks, count)
        quota = jnp.where(copied, poured, jnp.where(jnp.arange(host.size) == 0, count, 0))
        return load.at[host].add(jnp.where(copied, quota, 0), mode="drop"), quota

    _, quota = jax.lax.scan(pour, load, (hosts, total, copied))  # [E, C]
    ends = jnp.cumsum(quota, axis=1).at[topk_idx].get(mode="fill", fill_value=0)
    turn = _turns(topk_idx, placement.num_experts)
    turn = turn + before.at[topk_idx].get(mode="fill", fill_value=0)
    column = jnp.sum(turn[..., None] >= ends, axis=-1, dtype=jnp.int32)
    return _slots(placement, topk_idx, column)


def aebs(
    topk_idx: jax.Array, placement: ExpertPlacement, *, ranks: int, axis: Axis | None = None
) -> jax.Array:
    """Activated-expert balance (Janus, arXiv 2512.13525, algorithm 1): one copy serves the batch.

    Decoding waits for the rank with the most distinct active experts. Those with one copy are
    counted where they are; every other active one, in ascending id, goes to the host with the
    fewest so far. All ranks choose the same. Cost: an all-reduce of E words, a scan over E.
    """
    experts = jnp.arange(placement.num_experts, dtype=jnp.int32)
    wanted = jnp.any(topk_idx.reshape(-1, 1) == experts[None], axis=0)
    active = wanted if axis is None else jax.lax.pmax(wanted.astype(jnp.int32), axis) > 0
    hosts = _hosts(placement, ranks)
    copied = jnp.asarray(placement.num_replicas) > 1
    alone = (active & ~copied).astype(jnp.int32)
    load = jnp.zeros((ranks,), jnp.int32).at[hosts[:, 0]].add(alone)

    def place(load: jax.Array, step: tuple) -> tuple[jax.Array, jax.Array]:
        host, counts = step
        busy = load.at[host].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)
        column = jnp.argmin(busy).astype(jnp.int32)
        return load.at[host[column]].add(counts.astype(jnp.int32)), column

    _, column = jax.lax.scan(place, load, (hosts, active & copied))
    column = jnp.where(copied, column, 0)
    return _slots(placement, topk_idx, column.at[topk_idx].get(mode="fill", fill_value=0))


POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "local_first": local_first,
    "least_tokens": least_tokens,
    "aebs": aebs,
}


def _rank(axis: Axis | None) -> jax.Array:
    return jnp.int32(0) if axis is None else jax.lax.axis_index(axis)


def _hosts(placement: ExpertPlacement, ranks: int) -> jax.Array:
    """int32 [E, C]: rank of every copy, `ranks` past the last."""
    slots = jnp.asarray(placement.log_to_phys)
    return jnp.where(slots >= 0, slots // (placement.num_slots // ranks), ranks)


def _slots(placement: ExpertPlacement, topk_idx: jax.Array, column: jax.Array) -> jax.Array:
    table = jnp.asarray(placement.log_to_phys)
    return table.at[topk_idx, column].get(mode="fill", fill_value=placement.num_slots)


def _turns(topk_idx: jax.Array, num_experts: int) -> jax.Array:
    """int32 [T, K]: how many earlier assignments of this rank want the same expert."""
    perm = sort_by_group(topk_idx, num_experts)
    starts = jnp.cumsum(perm.group_sizes) - perm.group_sizes
    return perm.inverse.reshape(topk_idx.shape) - starts.at[topk_idx].get(mode="clip")


def _over_ranks(sizes: jax.Array, axis: Axis | None) -> tuple[jax.Array, jax.Array]:
    """Counts [E] of the ranks before this one, and of all."""
    if axis is None:
        return jnp.zeros_like(sizes), sizes
    every = jax.lax.all_gather(sizes, axis)  # [R, E]
    earlier = jnp.arange(every.shape[0]) < jax.lax.axis_index(axis)
    return jnp.sum(jnp.where(earlier[:, None], every, 0), axis=0), every.sum(0)


def _fill(load: jax.Array, valid: jax.Array, count: jax.Array) -> jax.Array:
    """int32 [C]: `count` tokens on top of `load` (where `valid`), the lowest raised first."""
    biggest = jnp.iinfo(jnp.int32).max
    key = jnp.where(valid, load, biggest)
    order = jnp.argsort(key, stable=True)
    key, nth = key[order], jnp.arange(1, load.size + 1, dtype=jnp.int32)
    below = jnp.cumsum(jnp.where(valid[order], key, 0))
    # Tokens that raise the first n to the level of the n-th.
    needed = jnp.where(valid[order], key * nth - below, biggest)
    used = jnp.sum(needed <= count, dtype=jnp.int32)
    level, extra = jnp.divmod(count + below[used - 1], used)
    poured = jnp.where(nth <= used, level + (nth <= extra).astype(jnp.int32) - key, 0)
    return jnp.zeros_like(load).at[order].set(poured)
