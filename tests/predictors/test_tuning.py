"""Online tuning: it waits for its window, moves the layers that are wrong, and helps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import llapor
from moejax.predictors.kinds import KINDS
from moejax.predictors.tuning import TuningConfig, init_tuning, missed, tune
from tests.predictors.test_kinds import SIZES
from tests.predictors.test_scorers import noisy

CFG = TuningConfig(window=8, threshold=0.1, learning_rate=0.3)
LAYERS, D, E, K = 4, 6, 8, 2


@pytest.fixture(scope="module")
def params():
    return noisy(partial(KINDS["llapor"].init, **SIZES["llapor"]))


def own_choices(params, hidden):
    """What the predictor itself would choose: it is never wrong about these."""
    return jax.lax.top_k(llapor.all_scores(params, hidden), K)[1]


def test_only_layers_that_are_wrong_move_and_only_when_the_window_is_full(params):
    hidden = jax.random.normal(jax.random.key(0), (LAYERS, 4, D))
    chosen = own_choices(params, hidden)
    chosen = chosen.at[2].set((chosen[2] + 1) % E).at[0].set((chosen[0] + 3) % E)
    step = jax.jit(partial(tune, cfg=CFG))
    once, state, moved = step(params, init_tuning(params, top_k=K, cfg=CFG), hidden, chosen)
    assert not moved.any() and int(state.seen) == 4
    jax.tree.map(np.testing.assert_array_equal, once, params)
    twice, state, moved = step(once, state, hidden, chosen)
    assert moved.tolist() == [True, False, True, False]
    changed = np.abs(twice.edge.w_out - params.edge.w_out).max((1, 2))
    assert changed[0] > 0 and changed[1] == 0
    changed = np.abs(twice.middle.w_out - params.middle.w_out).max((1, 2))
    assert changed[0] == 0 and changed[1] > 0
    np.testing.assert_array_equal(twice.middle_inputs.basis, params.middle_inputs.basis)
    wrong = missed(llapor.all_scores(params, hidden), chosen).mean(1)
    np.testing.assert_allclose(state.wrong.mean(1), wrong)


def test_tuning_learns_a_stream(params):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(LAYERS, 8, D)).astype(np.float32)
    chosen = jnp.asarray(np.tile(rng.permutation(E)[:K], (LAYERS, 8, 1)), jnp.int32)
    step, state = jax.jit(partial(tune, cfg=CFG)), init_tuning(params, top_k=K, cfg=CFG)
    before = missed(llapor.all_scores(params, points), chosen).mean()
    tuned = params
    for _ in range(30):
        tuned, state, _ = step(tuned, state, points, chosen)
    after = missed(llapor.all_scores(tuned, points), chosen).mean()
    assert before > 0.5 and after <= 0.1


def test_missed_counts_the_chosen_outside_the_best():
    scores = jnp.array([[[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 2, 3, 4]]])
    chosen = jnp.array([[[0, 1], [3, 0], [4, 4]]])  # the last is padding
    np.testing.assert_allclose(missed(scores, chosen), [[0, 0.5, 1]])


@pytest.mark.parametrize("wrong", [dict(window=0), dict(threshold=1.5), dict(learning_rate=0.0)])
def test_wrong_config(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TuningConfig(**wrong)
