"""The slot table stays a bijection, protects what is wanted, and evicts by policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.offload import slots
from moejax.offload.policies import init_usage, lfu, lru, touch
from moejax.offload.slots import (
    assign,
    choose_slot,
    forget_low,
    init_table,
    layer_slot_of,
    layer_slots,
    shared_slots,
    touch_layer,
)

NOTHING = jnp.zeros((4,), bool)


def want(*experts):
    return NOTHING.at[jnp.array(experts, jnp.int32)].set(True)


def one_row(*experts):
    return want(*experts).astype(jnp.int32)


def place(table, *granules):
    for slot, granule in enumerate(granules):
        table = assign(table, jnp.int32(slot), jnp.int32(granule))
    return table


def check_bijection(table):
    slot_of, granule_of = np.asarray(table.slot_of), np.asarray(table.granule_of)
    for granule, slot in enumerate(slot_of):
        assert slot == -1 or granule_of[slot] == granule
    for slot, granule in enumerate(granule_of):
        assert granule == -1 or slot_of[granule] == slot


def test_assign_replaces_and_forgets_the_old_granule():
    table = place(init_table(2, 4, shared_slots(2)), 3, 7)
    check_bijection(table)
    table = assign(table, jnp.int32(0), jnp.int32(5))
    check_bijection(table)
    assert np.asarray(table.slot_of).tolist() == [-1, -1, -1, -1, -1, 0, -1, 1]


def test_first_assignment_into_an_empty_slot_leaves_the_last_granule_alone():
    """-1 as an index would wrap around to granule N - 1."""
    table = place(init_table(2, 4, shared_slots(3)), 7)
    table = assign(table, jnp.int32(1), jnp.int32(2))
    assert int(table.slot_of[7]) == 0


def test_important_experts_of_few_bits_are_forgotten():
    """Those of another layer stay, and those that came in full."""
    table = init_table(2, 4, shared_slots(4), two_precisions=True)
    for slot, (granule, low) in enumerate(((5, True), (6, False), (7, True), (1, True))):
        table = assign(table, jnp.int32(slot), jnp.int32(granule), low=low)
    assert table.is_low.tolist() == [True, False, True, True]
    table = forget_low(table, jnp.int32(1), want(0, 1, 2))
    check_bijection(table)
    assert table.granule_of.tolist() == [-1, 6, 7, 1]
    table = assign(table, jnp.int32(0), jnp.int32(5))
    assert table.is_low.tolist() == [False, False, True, True]


def test_random_assignments_keep_the_bijection():
    rng = np.random.default_rng(0)
    table = init_table(3, 4, shared_slots(5))
    step = jax.jit(assign)
    for _ in range(40):
        absent = np.flatnonzero(np.asarray(table.slot_of) < 0)
        table = step(table, jnp.int32(rng.integers(5)), jnp.int32(rng.choice(absent)))
        check_bijection(table)


def test_touch_layer_touches_the_usage_of_its_layer_and_the_clock():
    table = init_table(3, 4, shared_slots(2))
    usages = [init_usage(4)] * 3
    for clock, (layer, rows) in enumerate([(0, 1), (2, 5), (1, 2), (0, 3)]):
        rows = rows * one_row(layer, 3)
        table = touch_layer(table, jnp.int32(layer), rows)
        usages[layer] = touch(usages[layer].replace(clock=jnp.int32(clock)), rows)
    for name in ("last_used", "uses", "average"):
        expected = np.concatenate([getattr(usage, name) for usage in usages])
        np.testing.assert_array_equal(getattr(table.usage, name), expected)
    assert int(table.usage.clock) == 4


def test_empty_slots_go_before_any_eviction():
    table = place(init_table(2, 4, shared_slots(3)), 0, 1)
    assert int(choose_slot(table, jnp.int32(0), lru, NOTHING)[0]) == 2


def test_least_recent_goes_and_wanted_experts_stay():
    table = place(init_table(2, 4, shared_slots(3)), 0, 1, 6)
    for layer, expert in [(0, 0), (0, 1), (1, 2)]:
        table = touch_layer(table, jnp.int32(layer), one_row(expert))
    assert int(choose_slot(table, jnp.int32(0), lru, NOTHING)[0]) == 0
    slot, free = choose_slot(table, jnp.int32(0), lru, want(0))
    assert (int(slot), bool(free)) == (1, True)
    # Granule 6 is expert 2 of layer 1: wanting expert 2 in layer 0 does not protect it.
    slot, free = choose_slot(table, jnp.int32(0), lru, want(0, 1, 2))
    assert (int(slot), bool(free)) == (2, True)


def test_when_everything_is_wanted_the_policy_decides_and_says_so():
    table = place(init_table(1, 4, shared_slots(2)), 2, 1)
    table = touch_layer(touch_layer(table, jnp.int32(0), one_row(1, 2)), jnp.int32(0), one_row(2))
    slot, free = choose_slot(table, jnp.int32(0), lfu, want(1, 2))
    assert (int(slot), bool(free)) == (1, False)


def test_layer_quotas_are_equal_and_respected():
    assert np.bincount(np.asarray(layer_slots(7, 3))).tolist() == [3, 2, 2]
    table = place(init_table(2, 4, layer_slots(4, 2)), 0, 1, 4, 5)
    table = touch_layer(table, jnp.int32(0), one_row(0, 1))
    # Layer 0's experts are more recent, yet layer 0 may only take its own slots.
    table = touch_layer(table, jnp.int32(0), one_row(1))
    assert int(choose_slot(table, jnp.int32(0), lru, NOTHING)[0]) == 0
    assert int(choose_slot(table, jnp.int32(1), lru, NOTHING)[0]) in (2, 3)


def test_fewer_slots_than_layers_is_refused_with_the_numbers():
    with pytest.raises(InputError, match="num_slots=2 is fewer than one for each of 3"):
        layer_slots(2, 3)


def test_layer_slot_of_reads_one_layer():
    table = place(init_table(3, 4, shared_slots(3)), 4, 11, 6)
    assert np.asarray(layer_slot_of(table, jnp.int32(1), 4)).tolist() == [0, -1, 2, -1]
    assert np.asarray(layer_slot_of(table, jnp.int32(2), 4)).tolist() == [-1, -1, -1, 1]


def test_write_row_changes_one_row(key):
    from moejax.experts.gated import init_experts

    rows = init_experts(key, (3,), 8, 4, out_scale=1.0, dtype=jnp.float32)
    one = jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], 7.0), rows)
    out = slots.write_row(rows, jnp.int32(1), one)
    np.testing.assert_array_equal(out.w_down[1], one.w_down)
    np.testing.assert_array_equal(out.w_down[0], rows.w_down[0])
    np.testing.assert_array_equal(out.w_gate[2], rows.w_gate[2])
