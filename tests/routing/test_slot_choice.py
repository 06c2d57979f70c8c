"""Slot gates on one group: worked by hand, against numpy, and at their edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.routing.config import ExpertChoiceConfig, SoftConfig
from moejax.routing.losses import load_balancing_loss, router_z_loss
from moejax.routing.slot_choice import (
    ExpertChoice,
    SlotRouterParams,
    filled_slots,
    from_slots,
    init_slot_router,
    route_slots,
    slot_sums,
    to_slots,
    unserved_tokens,
)
from tests.kernels.cases import assert_close

T, D, E, C = 12, 6, 3, 2
CHOICE = ExpertChoiceConfig(num_experts=E, capacity_factor=0.5)
SOFT = SoftConfig(num_experts=E, slots_per_expert=C)
CONFIGS = {"expert_choice": CHOICE, "soft": SOFT}
MASK, ALL = np.arange(T) % 4 != 0, np.ones(T, bool)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "expert_choice": SlotRouterParams(w_router=normal(0, D, E)),
    "soft": SlotRouterParams(w_router=normal(0, D, E, C), scale=np.float32(4.0)),
}
X = normal(1, T, D)


@partial(jax.jit, static_argnames="cfg")
def through(params, x, cfg, mask):
    """The routing, what experts that double their input give, and the statistics."""
    routing = route_slots(params, x, cfg, mask=mask)
    slots = to_slots(routing, x)
    y = from_slots(routing, 2 * slots)
    return routing, slots, y, filled_slots(routing), unserved_tokens(routing), slot_sums(routing)


def test_expert_choice_worked_by_hand():
    # Scores of 4 tokens by 2 experts are softmax([a, 0]); C = 1 * 4 / 2.
    cfg = ExpertChoiceConfig(num_experts=2, capacity_factor=1.0)
    x = np.asarray([[2.0], [-1.0], [1.0], [0.5]], np.float32)
    params = SlotRouterParams(w_router=np.asarray([[1.0, 0.0]], np.float32))
    routing, slots, y, filled, unserved, sums = through(params, x, cfg, np.ones(4, bool))
    score = 1 / (1 + np.exp(-np.asarray(x[:, 0])))
    np.testing.assert_array_equal(routing.token_idx, [[0, 2], [1, 3]])
    np.testing.assert_allclose(
        routing.weights, [[score[0], score[2]], [1 - score[1], 1 - score[3]]], rtol=1e-6
    )
    np.testing.assert_array_equal(slots[..., 0], [[2.0, 1.0], [-1.0, 0.5]])
    weight = np.where([True, False, True, False], score, 1 - score)
    np.testing.assert_allclose(y[:, 0], 2 * weight * np.asarray(x[:, 0]), rtol=1e-6)
    assert filled.all() and unserved == 0
    np.testing.assert_array_equal(sums.load, [2, 2])
    np.testing.assert_allclose(load_balancing_loss(sums), 1.0, rtol=1e-6)
    # One valid token: every expert takes it, its other slot stays empty and weighs nothing.
    routing, slots, y, filled, unserved, _ = through(params, x, cfg, np.arange(4) == 3)
    np.testing.assert_array_equal(routing.token_idx, [[3, 4], [3, 4]])
    np.testing.assert_array_equal(slots[:, 1], np.zeros((2, 1)))
    np.testing.assert_array_equal(filled, [[True, False]] * 2)
    np.testing.assert_allclose(y[:, 0], [0, 0, 0, 1.0], rtol=1e-6)  # both experts: 2 * 0.5
    assert unserved == 0


def test_ties_go_to_the_earlier_token():
    params = SlotRouterParams(w_router=np.zeros((D, E), np.float32))
    routing = through(params, X, CHOICE, ALL)[0]
    np.testing.assert_array_equal(routing.token_idx, [[0, 1]] * E)


def test_soft_means_have_weights_that_sum_to_one():
    routing, slots, y, filled, unserved, sums = through(PARAMS["soft"], X, SOFT, MASK)
    np.testing.assert_allclose(routing.to_slot.sum(0), np.ones((E, C)), rtol=1e-5)
    np.testing.assert_allclose(routing.to_token[MASK].sum((1, 2)), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(routing.to_slot[~MASK], 0.0)
    np.testing.assert_array_equal(y[~MASK], 0.0)
    assert filled.all() and unserved == 0 and slots.shape == (E, C, D)
    np.testing.assert_array_equal(sums.load, [C] * E)


def plain_rows(gate: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What `through` gives its tokens, in numpy."""
    w_router, tokens = np.asarray(PARAMS[gate].w_router, np.float64), np.flatnonzero(mask)
    y = np.zeros((T, D))
    if gate == "expert_choice":
        score = np.exp(x @ w_router)
        score /= score.sum(1, keepdims=True)
        for e in range(E):
            for t in sorted(tokens, key=lambda t, e=e: -score[t, e])[:C]:
                y[t] += score[t, e] * 2 * x[t]
        return y
    slots = w_router.reshape(D, E * C)
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(slots, axis=0)[None]
    amount = np.exp(4.0 * (x @ slots) / lengths) * mask[:, None]
    means = (amount / amount.sum(0)).T @ x
    y[tokens] = (amount[tokens] / amount[tokens].sum(1, keepdims=True)) @ (2 * means)
    return y


@pytest.mark.parametrize("gate", CONFIGS)
def test_equals_numpy_whatever_the_padding_holds(gate):
    y = through(PARAMS[gate], X, CONFIGS[gate], MASK)[2]
    assert_close(y, plain_rows(gate, X.astype(np.float64), MASK))
    for content in (1e3, 0.0):
        other = np.where(MASK[:, None], X, np.float32(content))
        np.testing.assert_array_equal(through(PARAMS[gate], other, CONFIGS[gate], MASK)[2], y)


@pytest.mark.parametrize("gate", CONFIGS)
def test_a_group_of_padding_alone_is_zero_and_has_no_load(gate):
    _, slots, y, filled, unserved, sums = through(
        PARAMS[gate], 0 * X, CONFIGS[gate], np.zeros(T, bool)
    )
    for leaf in (slots, y, filled, unserved, sums.load, sums.tokens, sums.share):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert load_balancing_loss(sums) == router_z_loss(sums) == 0


@pytest.mark.parametrize("gate", CONFIGS)
def test_neither_gate_is_causal(gate):
    """The last token changes what earlier ones get, as the flag says."""
    cfg, rows = CONFIGS[gate], []
    for last in (X[0], 3 * X[2]):
        x = np.concatenate([X[:-1], last[None]])
        rows.append(np.asarray(through(PARAMS[gate], x, cfg, ALL)[2][:-1]))
    assert np.abs(rows[0] - rows[1]).max() > 0.1 and not cfg.causal and cfg.gate == gate


def test_unserved_tokens_are_those_that_nobody_took():
    routing, _, y, _, unserved, _ = through(PARAMS["expert_choice"], X, CHOICE, MASK)
    assert isinstance(routing, ExpertChoice) and routing.token_idx.dtype == jnp.int32
    taken = set(np.asarray(routing.token_idx).ravel().tolist())
    left = [t for t in range(T) if MASK[t] and t not in taken]
    assert unserved == len(left) > 0
    np.testing.assert_array_equal(y[np.asarray(left)], 0.0)


def test_initial_weights(key):
    choice = jax.eval_shape(lambda: init_slot_router(key, D, CHOICE))
    assert choice.w_router.shape == (D, E) and choice.scale is None
    soft = jax.jit(init_slot_router, static_argnums=(1, 2))(
        key, 64, SoftConfig(num_experts=8, slots_per_expert=8)
    )
    assert soft.w_router.shape == (64, 8, 8) and soft.scale == 1.0
    np.testing.assert_allclose(np.std(soft.w_router), 64**-0.5, rtol=0.05)


def test_slots_and_wrong_input():
    assert [ExpertChoiceConfig(num_experts=8).slots(t) for t in (64, 66, 1)] == [16, 16, 1]
    assert ExpertChoiceConfig(num_experts=2, capacity_factor=2).slots(5) == 5
    wrong = [
        (lambda: ExpertChoiceConfig(num_experts=0), "num_experts=0 must be at least 1"),
        (lambda: ExpertChoiceConfig(num_experts=4, capacity_factor=5), "capacity_factor=5 must be"),
        (lambda: ExpertChoiceConfig(num_experts=4, capacity_factor=0), "capacity_factor=0 must be"),
        (lambda: SoftConfig(num_experts=0), "num_experts=0 must be at least 1"),
        (lambda: SoftConfig(num_experts=4, slots_per_expert=0), "slots_per_expert=0 must be"),
        (lambda: route_slots(PARAMS["soft"], X[:0], SOFT), "a group of 0 tokens"),
    ]
    for make, message in wrong:
        with pytest.raises(InputError, match=message):
            make()
