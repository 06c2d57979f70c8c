"""Placements: tables that agree with each other, and every wrong array refused with its numbers."""

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.placement.build import from_phys_to_log, identity, max_replicas, swapped


def check_tables(placement):
    """`log_to_phys` and `num_replicas` are those of `phys_to_log`, by loops."""
    slots = placement.phys_to_log.reshape(-1, placement.num_slots)
    tables = placement.log_to_phys.reshape(len(slots), placement.num_experts, -1)
    counts = placement.num_replicas.reshape(len(slots), -1)
    for row, table, count in zip(slots, tables, counts, strict=True):
        for e in range(placement.num_experts):
            held = [p for p in range(placement.num_slots) if row[p] == e]
            assert table[e].tolist() == held + [-1] * (table.shape[1] - len(held))
            assert count[e] == len(held)


def test_tables_agree():
    rng = np.random.default_rng(0)
    rows = [rng.permutation([0, 1, 2, 3, 4, 1, 4, 4]) for _ in range(3)]
    for slots in (rows[0], np.stack(rows)):
        placement = from_phys_to_log(slots, num_experts=5, ranks=4, twice_on_rank=True)
        check_tables(placement)
        assert {leaf.dtype for leaf in jax.tree.leaves(placement)} == {np.dtype(np.int32)}
    assert (placement.num_slots, placement.num_experts) == (8, 5)
    assert identity(4).phys_to_log.tolist() == [0, 1, 2, 3]


def test_equally_many_slots_give_equal_shapes():
    one = from_phys_to_log([0, 1, 2, 0], num_experts=3, ranks=2)
    other = from_phys_to_log([1, 2, 0, 1], num_experts=3, ranks=2)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(p)] for p in (one, other)]
    assert shapes[0] == shapes[1] == [(4,), (3, max_replicas(4, 3)), (3,)]


def test_swaps():
    placement = from_phys_to_log([[0, 1, 2, 0], [2, 1, 0, 1]], num_experts=3, ranks=2)
    moved = swapped(placement, [1, 0], [0, 3], [3, 2])
    assert moved.phys_to_log.tolist() == [[0, 1, 0, 2], [1, 1, 0, 2]]
    check_tables(moved)
    assert placement.phys_to_log.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]
    assert swapped(identity(3), [0], [0], [2]).phys_to_log.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "slots, message",
    [
        ([0, 1, 2], "3 slots are not divisible by 2 ranks"),
        ([0, 1, 2, 3], r"slots hold experts \[3\], num_experts=3"),
        ([0, 1, 1, 0], r"4 slots hold no copy of 1 of 3 experts, the first is \[2\]"),
        ([[0, 1, 2, 0], [1, 1, 0, 2]], "layer 1: rank 0 holds 2 copies of expert 1"),
        ([[[0, 1, 2, 0]]], r"phys_to_log has shape \(1, 1, 4\)"),
    ],
)
def test_wrong_input(slots, message):
    with pytest.raises(InputError, match=message):
        from_phys_to_log(slots, num_experts=3, ranks=2)
