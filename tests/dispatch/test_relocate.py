"""Moves against numpy, byte for byte; the bytes of a swap; programs that are compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.aot.collectives import collectives
from moejax.aot.hlo import parse_hlo
from moejax.checkpoint import manager
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch import relocate as module
from moejax.dispatch.move import Swaps
from moejax.dispatch.relocate import (
    per_layer,
    relocate,
    swap_experts,
    to_logical,
    to_physical,
)
from moejax.placement.build import from_phys_to_log, identity

E, SLOTS, RANKS = 4, 8, 4
MESH = make_mesh(data=2, expert=RANKS)


@struct.dataclass
class Layers:
    experts: Any
    w_router: Any


@struct.dataclass
class Model:
    groups: tuple[Layers, ...]


def state(num_experts=E):
    """Two groups of 2 and 1 layers, in numpy; parameters and a moment, three dtypes, odd sizes."""
    rng = np.random.default_rng(0)

    def model():
        return Model(
            groups=tuple(
                Layers(
                    experts={
                        "w": rng.normal(size=(depth, num_experts, 3, 2)).astype(np.float32),
                        "scale": rng.normal(size=(depth, num_experts, 3)).astype(jnp.bfloat16),
                        "q": rng.integers(-9, 9, (depth, num_experts, 5)).astype(np.int8),
                    },
                    w_router=rng.normal(size=(depth, 3, num_experts)).astype(np.float32),
                )
                for depth in (2, 1)
            )
        )

    made = {"params": model(), "mu": model(), "step": np.int32(7)}
    weights = made["params"].groups[0].experts["w"]
    weights[0, 1, 0], weights[1, 2, 0] = np.nan, -0.0
    return made


def placements():
    """Per layer: in order; shuffled; three copies of one expert."""
    orders = [
        [[0, 1, 2, 3, 0, 1, 2, 3]] * 3,
        [[1, 0, 3, 1, 0, 2, 2, 3], [3, 2, 1, 0, 3, 1, 0, 2], [0, 1, 2, 3, 0, 1, 2, 3]],
        [[2, 0, 2, 1, 2, 3, 1, 0], [0, 1, 0, 2, 0, 3, 1, 2], [3, 1, 3, 0, 3, 2, 0, 1]],
    ]
    return [from_phys_to_log(rows, num_experts=E, ranks=RANKS) for rows in orders]


def held(tree, placement):
    """A logical state in slots, by numpy: the oracle."""
    return to_physical(tree, placement)


SPEC = P(None, "expert")


def on_mesh(tree, spec=SPEC, mesh=MESH):
    def put(path, leaf):
        is_expert = any(getattr(key, "name", None) == "experts" for key in path)
        return jax.device_put(leaf, NamedSharding(mesh, spec if is_expert else P()))

    return jax.tree_util.tree_map_with_path(put, tree)


def assert_same_bytes(got, want):
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for one, other in leaves:
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def test_logical_and_physical_by_numpy():
    tree, (_, placement, _) = state(), placements()
    got = to_physical(tree, placement)
    for group, first in ((0, 0), (1, 2)):
        for name, leaf in tree["mu"].groups[group].experts.items():
            moved = got["mu"].groups[group].experts[name]
            for layer, rows in enumerate(leaf):
                slots = placement.phys_to_log[first + layer]
                assert_same_bytes(moved[layer], np.stack([rows[e] for e in slots]))
    assert got["params"].groups[0].w_router is tree["params"].groups[0].w_router
    assert_same_bytes(to_logical(got, placement), tree)
    shared = from_phys_to_log(placement.phys_to_log[0], num_experts=E, ranks=RANKS)
    want = to_physical(tree, per_layer(shared, 3))
    assert_same_bytes(to_physical(tree, shared), want)


def test_relocation_is_a_permutation_to_the_bit_and_compiles_once():
    tree, every = state(), placements()
    before = module._relocate._cache_size()
    for old in every:
        for new in every:
            moved = relocate(on_mesh(held(tree, old)), old, new, MESH)
            assert_same_bytes(moved, held(tree, new))
    moved = relocate(moved, every[2], every[1], MESH)  # its own output, and no new shardings
    assert_same_bytes(moved, held(tree, every[1]))
    assert module._relocate._cache_size() == before + 1


def test_a_checkpoint_restores_under_another_placement(tmp_path):
    """Saved in logical order from a mesh that splits one more dim over `data`, axes explicit."""
    mesh = make_mesh(data=2, expert=RANKS, axis_type="explicit")
    one, other = (jax.tree.map(lambda leaf: leaf[:2], p) for p in placements()[1:])
    weights = np.concatenate([state()["params"].groups[0].experts["w"]] * 2, axis=-1)
    tree = {"params": Layers(experts=weights, w_router=np.ones(3, np.float32))}
    spec = P(None, "expert", None, "data")
    saved = to_logical(on_mesh(held(tree, one), spec, mesh), one, mesh)
    assert_same_bytes(saved, tree)
    assert saved["params"].experts.sharding.spec == spec
    with manager.open_manager(tmp_path) as opened:
        manager.save(opened, 1, params=saved["params"], optimizer={"step": np.int32(1)}, extra={})
        manager.finish(opened)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            saved,
        )
        restored = manager.restore(opened, 1, shapes)
    assert_same_bytes(to_physical(restored, other, mesh), held(tree, other))


def test_swaps_move_bytes_and_compile_once_per_number():
    tree, (_, placement, _) = state(), placements()
    before = module._swap._cache_size()
    moved = on_mesh(held(tree, placement))
    now = placement
    # Between ranks, within one, a slot with itself; two layers at a time.
    for layers, a, b in [([0, 2], [0, 5], [7, 1]), ([1, 0], [2, 4], [3, 4])]:
        moved, now = swap_experts(moved, now, MESH, layers=layers, a=a, b=b)
        assert_same_bytes(moved, held(tree, now))
    assert module._swap._cache_size() == before + 1
    want = placement.phys_to_log.copy()
    want[0, [0, 7]], want[2, [5, 1]] = want[0, [7, 0]], want[2, [1, 5]]
    want[1, [2, 3]] = want[1, [3, 2]]
    np.testing.assert_array_equal(now.phys_to_log, want)


@pytest.mark.parametrize("num_slots", [8, 32])
def test_a_swap_is_one_all_reduce_of_two_experts(num_slots):
    leaf = jax.ShapeDtypeStruct((3, num_slots, 6, 4), jnp.float32)
    bias = jax.ShapeDtypeStruct((3, num_slots, 5), jnp.bfloat16)
    one = np.zeros(1, np.int32)
    lowered = module._swap.lower(
        ((leaf, leaf, bias),),
        swaps=Swaps(layers=one, a=one, b=one),
        specs=((P(None, "expert"),) * 3,),
        mesh=MESH,
    )
    text = lowered.compile().as_text()
    assert text is not None
    found = [(one.kind, one.nbytes) for one in collectives(parse_hlo(text), MESH)]
    expert = 2 * 6 * 4 * 4 + 5 * 2
    assert found == [("all-reduce", 2 * (expert + -expert % 4))]


def test_wrong_input():
    tree, every = state(), placements()
    tree, placement = held(tree, every[0]), every[0]
    wide = from_phys_to_log([0, 1, 2, 3] * 4, num_experts=E, ranks=RANKS)
    for call, message in [
        (lambda: relocate(tree, placement, wide, MESH), "8 slots, the new one 16"),
        (lambda: relocate(tree, wide, wide, MESH), "has 8 rows, the placement 16"),
        (lambda: relocate(tree, identity(8), placement, MESH), "8 experts, the new one 4"),
        (lambda: relocate({"w": 1}, placement, placement, MESH), "no leaf under a field"),
        (
            lambda: to_logical(tree, per_layer(wide, 2), MESH),
            "the placement has 2 layers, the tree 3",
        ),
        (
            lambda: to_logical(tree, placement, make_mesh(expert=3)),
            "8 slots are not divisible by 3 ranks",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    for layers, a, b, message in [
        ([0], [0], [8], r"slot \[8\] is not one of 8"),
        ([3], [0], [1], r"layer \[3\] is not one of 3"),
        ([0, 0], [1, 2], [2, 3], r"slot \[2\] of layer \[0\] is swapped twice"),
        ([0], [1, 2], [2, 3], r"shapes \(1,\), \(2,\) and \(2,\)"),
    ]:
        with pytest.raises(InputError, match=message):
            swap_experts(tree, placement, MESH, layers=layers, a=a, b=b)
    with pytest.raises(InputError, match="wants a placement with a leading"):
        swap_experts(tree, identity(8), MESH, layers=[0], a=[0], b=[1])
