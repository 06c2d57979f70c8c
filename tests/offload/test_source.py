"""Two sources of one stack: the same rows, and what is said before they are fetched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.experts.gated import init_experts
from moejax.experts.stage import stacked
from moejax.offload.disk import DiskExperts
from moejax.offload.precision import in_two_precisions
from moejax.offload.source import DiskSource, HostSource, moved_bytes, shapes_of, source_of
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import EXPERT_SPEC, to_host
from tests.exact import exact_jit
from tests.offload.on_disk import on_disk

L, E, D, F = 2, 4, 16, 12


@pytest.fixture(scope="module")
def experts():
    leaves = init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), leaves)


@pytest.fixture(scope="module")
def folder(experts, tmp_path_factory):
    return on_disk(tmp_path_factory.mktemp("experts"), experts)


@pytest.fixture
def calls(monkeypatch):
    """What the files were asked for, in turn: (row, granule) and (need, granules)."""
    made = []
    row, will_need = DiskExperts.row, DiskExperts.will_need

    def read(self, granule):
        made.append(("row", int(granule)))
        return row(self, granule)

    def need(self, granules):
        made.append(("need", np.asarray(granules).tolist()))
        return will_need(self, granules)

    monkeypatch.setattr(DiskExperts, "row", read)
    monkeypatch.setattr(DiskExperts, "will_need", need)
    return made


def test_kinds_of_stores(experts, folder):
    host, disk = source_of(experts), source_of(folder)
    assert isinstance(host, HostSource) and isinstance(disk, DiskSource)
    for source in (host, disk):
        assert (source.num_layers, source.num_experts) == (L, E)
    assert shapes_of(experts) is experts and shapes_of(folder).w_up.shape == (L, E, D, F)


def test_a_store_in_two_precisions(experts):
    """int8 keeps weights to half a step of 1 / 128, in the dtype of the full ones."""
    two = in_two_precisions(to_host(experts, make_mesh()), "int8")
    source = source_of(two)
    assert isinstance(source, HostSource) and shapes_of(two) is two.full
    full = jax.jit(source.fetch)(jnp.int32(5))
    low = jax.jit(lambda granule: source.widen(source.fetch_low(granule)))(jnp.int32(5))
    for got, want in zip(jax.tree.leaves(low), jax.tree.leaves(full), strict=True):
        assert got.dtype == want.dtype == jnp.bfloat16
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert 0 < np.abs(got - want).max() <= np.abs(want).max() / 127
    in_full, in_int8 = 3 * D * F * 2, 3 * D * F + 4 * (F + F + D)  # a scale per column
    assert moved_bytes(experts, fetches=5) == 5 * in_full
    assert moved_bytes(two, fetches=5, low_fetches=2) == 3 * in_full + 2 * in_int8


def test_ranks_find_their_experts_in_files_of_all(experts, folder, calls):
    """Rank 1 of two calls expert 3 of layer 1 granule 1 * 2 + 1."""

    def fetch(experts, folder, granule):
        host, disk = source_of(experts, "expert"), source_of(folder, "expert")
        told = disk.announce(granule, granule >= 0)
        ours, theirs = disk.fetch(told[0]), host.fetch(granule[0])
        return jax.tree.map(lambda leaf: leaf[None], (ours, theirs))

    specs = EXPERT_SPEC, EXPERT_SPEC, P("expert")
    run = jax.shard_map(fetch, mesh=make_mesh(expert=2), in_specs=specs, out_specs=P("expert"))
    ours, theirs = jax.jit(run)(experts, folder, jnp.array([2, 3], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert sorted(calls) == [("need", [4]), ("need", [7]), ("row", 4), ("row", 7)]


def test_a_layer_is_announced_before_its_rows_are_read(experts, folder, calls):
    """Bits are those of resident experts; what is cached is neither announced nor read."""
    cfg = OffloadConfig(num_slots=4)
    x = jnp.linspace(-1, 1, 2 * D, dtype=jnp.float32).reshape(2, D).astype(jnp.bfloat16)

    @exact_jit
    def both(experts, state, idx):
        routing = Routing(
            topk_idx=idx,
            topk_weights=jnp.ones(idx.shape, jnp.float32),
            router_logits=jnp.zeros((2, E), jnp.float32),
        )
        ours, state, counts = offloaded(folder, cfg)(x, routing, None, jnp.int32(1), state)
        theirs, _, _ = stacked(experts)(x, routing, None, jnp.int32(1), None)
        return ours, theirs, state, counts

    state, asked = init_state(folder.shapes, cfg), []
    for idx in ([[0, 2], [3, 0]], [[0, 3], [3, 0]], [[1, 3], [E, E]]):
        ours, theirs, state, counts = both(experts, state, jnp.array(idx, jnp.int32))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        asked.append((int(counts.demand_fetches), list(calls)))
        calls.clear()
    (first, before), (second, after), (third, single) = asked
    assert (first, second, third) == (3, 1, 1)
    assert before[0][0] == "need" and sorted(before[0][1]) == [-1, E, E + 2, E + 3]
    assert sorted(before[1:]) == [("row", E), ("row", E + 2), ("row", E + 3)]
    # Two slots hold the two that came last; one row alone is not announced.
    assert len(after) == len(single) == 1 and single == [("row", E + 1)]


def test_the_host_does_not_compute_what_is_on_disk(folder):
    with pytest.raises(InputError, match="serve='host': experts on disk can only be fetched"):
        offloaded(folder, OffloadConfig(num_slots=4, serve="host"))
    with pytest.raises(InputError, match="not in two precisions: they are on disk$"):
        offloaded(folder, OffloadConfig(num_slots=4, importance_threshold=0.5))


def test_a_source_is_a_tree_without_weights(folder):
    source = source_of(folder)
    assert len(jax.tree.leaves(source)) == 1  # where a rank's experts begin
    again = dataclasses.replace(source, first=jnp.int32(1))
    assert jax.tree.structure(source) == jax.tree.structure(again)
