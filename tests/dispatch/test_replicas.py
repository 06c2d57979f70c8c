"""Replica policies against plain loops; every choice is a copy of the expert that was asked for."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.replicas import POLICIES, aebs, local_first
from moejax.placement.build import from_phys_to_log
from moejax.placement.eplb import rebalance

E, SLOTS, RANKS, T, K = 12, 16, 4, 32, 3
MESH = make_mesh(expert=RANKS)


def placements():
    """Two placements of 12 experts on 16 slots, with 2 and with 4 copies of an expert."""
    rows = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 3, 7, 8],
        [5, 0, 1, 2, 5, 3, 4, 6, 5, 7, 8, 9, 5, 10, 11, 0],
    ]
    return [from_phys_to_log(row, num_experts=E, ranks=RANKS) for row in rows]


def choices(seed: int) -> np.ndarray:
    """int32 [T, K] distinct choices, low ids more often; every fifth token is padding."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, E + 1)
    idx = np.stack([rng.choice(E, K, replace=False, p=share / share.sum()) for _ in range(T)])
    idx[::5] = E
    return idx.astype(np.int32)


@pytest.fixture(scope="module")
def alone():
    """Every policy as one caller with all tokens runs it."""
    with_axis = {"local_first"}
    return {
        name: jax.jit(partial(policy, ranks=RANKS, axis=None))
        for name, policy in POLICIES.items()
        if name not in with_axis
    }


@pytest.fixture(scope="module")
def sharded():
    """All policies with tokens over the ranks, in one program."""

    def body(topk_idx, placement):
        return {
            name: policy(topk_idx, placement, ranks=RANKS, axis="expert")
            for name, policy in POLICIES.items()
        }

    specs = (P("expert"), P())
    return jax.jit(jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=P("expert")))


def check_valid(slots, idx, placement):
    slots = np.asarray(slots)
    np.testing.assert_array_equal(slots == SLOTS, idx == E)
    held = np.append(placement.phys_to_log, E)
    np.testing.assert_array_equal(held[slots], idx)


def test_every_choice_is_a_copy_and_one_program_serves_all_placements(alone, sharded):
    for placement in placements():
        for seed in range(2):
            idx = choices(seed)
            for run in alone.values():
                check_valid(run(idx, placement), idx, placement)
            for slots in sharded(idx, placement).values():
                check_valid(slots, idx, placement)
    assert {run._cache_size() for run in [*alone.values(), sharded]} == {1}


def slots_of(placement, expert):
    return [int(p) for p in placement.log_to_phys[expert] if p >= 0]


def test_round_robin(sharded):
    for placement in placements():
        idx = choices(0)
        want = np.full(idx.shape, SLOTS)
        for t, row in enumerate(idx):
            rank, token = divmod(t, T // RANKS)
            for k, e in enumerate(row[row < E]):
                copies = slots_of(placement, e)
                want[t, k] = copies[(token + rank) % len(copies)]
        np.testing.assert_array_equal(sharded(idx, placement)["round_robin"], want)


def test_local_first(sharded):
    for placement in placements():
        idx = choices(1)
        got = {name: np.asarray(slots) for name, slots in sharded(idx, placement).items()}
        for t in range(T):
            for k in range(K):
                if idx[t, k] < E:
                    rank = t // (T // RANKS)
                    own = [p for p in slots_of(placement, idx[t, k]) if p // 4 == rank]
                    want = own[0] if own else got["round_robin"][t, k]
                    assert got["local_first"][t, k] == want


def pour(idx, placement):
    """`least_tokens` one token at a time."""
    total = np.bincount(idx.reshape(-1), minlength=E + 1)
    load, columns = [0] * RANKS, {}
    copies = [slots_of(placement, e) for e in range(E)]
    for e in range(E):
        if len(copies[e]) == 1:
            load[copies[e][0] // 4] += total[e]
    for e in range(E):
        quota = [total[e]]
        if len(copies[e]) > 1:
            hosts = [p // 4 for p in copies[e]]
            order = sorted(range(len(hosts)), key=lambda c: (load[hosts[c]], c))
            quota = [0] * len(hosts)
            for _ in range(total[e]):
                column = min(order, key=lambda c: load[hosts[c]])
                quota[column] += 1
                load[hosts[column]] += 1
        columns[e] = [p for p, n in zip(copies[e], quota, strict=True) for _ in range(n)]
    rows = [columns[e].pop(0) if e < E else SLOTS for e in idx.reshape(-1)]
    return np.reshape(rows, idx.shape), load


def test_least_tokens_levels_the_ranks(alone, sharded):
    for placement in placements():
        for seed in range(3):
            idx = choices(seed)
            want, load = pour(idx, placement)
            np.testing.assert_array_equal(alone["least_tokens"](idx, placement), want)
            got = sharded(idx, placement)
            np.testing.assert_array_equal(got["least_tokens"], want)
            others = [tokens_of_ranks(got[name]).max() for name in ("round_robin", "local_first")]
            assert tokens_of_ranks(want).tolist() == load and max(load) <= min(others)


def tokens_of_ranks(slots):
    slots = np.asarray(slots)
    return np.bincount(slots[slots < SLOTS] // 4, minlength=RANKS)


def reference_aebs(idx, placement, ranks):
    """Algorithm 1 of Janus, with experts in ascending order."""
    num_experts, per_rank = placement.num_experts, placement.num_slots // ranks
    active = sorted(set(idx.reshape(-1)) - {num_experts})
    load, chosen = [0] * ranks, {num_experts: placement.num_slots}
    for e in active:
        if len(slots_of(placement, e)) == 1:
            (chosen[e],) = slots_of(placement, e)
            load[chosen[e] // per_rank] += 1
    for e in active:
        if e not in chosen:
            chosen[e] = min(slots_of(placement, e), key=lambda p: load[p // per_rank])
            load[chosen[e] // per_rank] += 1
    return np.vectorize(chosen.get)(idx), load


def test_aebs_equals_the_algorithm_on_every_rank(alone, sharded):
    for placement in placements():
        for seed in range(3):
            idx = choices(seed)
            want, _ = reference_aebs(idx, placement, RANKS)
            np.testing.assert_array_equal(alone["aebs"](idx, placement), want)
            np.testing.assert_array_equal(sharded(idx, placement)["aebs"], want)


def test_aebs_by_hand():
    """Experts 0, 1 on rank 0, 4 on rank 1, 2 and 3 on both: two active experts on each rank."""
    placement = from_phys_to_log([0, 1, 2, 3, 2, 3, 4, 5], num_experts=6, ranks=2)
    idx = jnp.array([[0, 2], [1, 3], [2, 3]], jnp.int32)
    slots = jax.jit(partial(aebs, ranks=2))(idx, placement)
    assert slots.tolist() == [[0, 4], [1, 5], [4, 5]]
    assert reference_aebs(np.asarray(idx), placement, 2)[1] == [2, 2]


def test_aebs_activates_fewer_experts_than_chance():
    """160 experts, 27 slots on each of 8 ranks, top 6: below random copies and Janus' bound."""
    experts, ranks, per_rank, top_k, batch = 160, 8, 27, 6, 64
    rng = np.random.default_rng(0)
    slots = rebalance(rng.lognormal(size=(1, experts)), num_slots=216, num_ranks=ranks)[0]
    placement = from_phys_to_log(slots, num_experts=experts, ranks=ranks, twice_on_rank=True)
    run, gain = jax.jit(partial(aebs, ranks=ranks)), 0
    for tokens in (4, 16, 64):
        idx = np.full((batch, top_k), experts, np.int32)
        idx[:tokens] = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
        got = busiest(np.asarray(run(idx, placement)), 216, per_rank)
        turn = rng.integers(0, placement.num_replicas[idx[:tokens]])
        chance = busiest(placement.log_to_phys[idx[:tokens], turn], 216, per_rank)
        mean = per_rank * (1 - (1 - top_k / experts) ** tokens)
        bound = min(per_rank, mean + math.sqrt(2 * mean * math.log(ranks))) + 1
        assert got <= chance and got <= math.floor(bound)
        gain += chance - got
    assert gain > 0


def busiest(slots, num_slots, per_rank):
    """Distinct active slots of the rank that has most."""
    active = np.unique(slots[slots < num_slots])
    return np.bincount(active // per_rank).max()


def test_wrong_input():
    with pytest.raises(InputError, match="local_first wants the axis"):
        local_first(jnp.zeros((1, 1), jnp.int32), placements()[0], ranks=RANKS, axis=None)
