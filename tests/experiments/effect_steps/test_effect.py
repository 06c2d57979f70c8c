"""Simulated and measured effect of predictors, on small stand-ins; what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.effect_steps import decode, replay, report, study
from experiments.offload_steps.arms import Arm
from moejax.core.errors import InputError

L, N, S, E, K = 4, 8, 64, 16, 2


def test_predictors_that_were_not_fitted_are_named(tmp_path):
    with pytest.raises(InputError, match="has no llapor; run experiments.hidden_predictors"):
        study.read_fitted(tmp_path)


def test_lanes_lie_side_by_side():
    values = np.arange(L * N * S).reshape(L, N, S)
    rows = replay.side_by_side(values, 2, 100, seed=0)
    assert rows.shape == (L, 100, 2)
    starts = rows[0, 0] // S
    np.testing.assert_array_equal(rows[1, :S, 1], values[1, starts[1]])
    assert len(np.unique(rows)) == rows.size
    with pytest.raises(InputError, match="8 windows of 64 tokens, 100 steps of batch=5 want 10"):
        replay.side_by_side(values, 5, 100, seed=0)


def test_no_lane_where_the_window_is_short_and_no_harm_where_guesses_are_bad(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(L, N, S, E)).astype(np.float32)
    idx = np.argsort(-truth, axis=-1)[..., :K].astype(np.int32)
    scores = {"right": truth[1:], "wrong": rng.normal(size=(L - 1, N, S, E))}
    steps = replay.make_steps(idx, scores, 2, 64, num_experts=E, sizes=replay.QWEN3, seed=0)

    def case(context):
        return replay.replay(
            steps, "A100-PCIe4", sizes=replay.QWEN3, context=context, fraction=0.25
        )

    short, long = case(0), case(1 << 20)
    assert short["window_over_tau"] < 0.1 and long["window_over_tau"] > 5
    found = short["predictors"]
    assert found["right"]["precision_by_rank"][0] == 1 and found["wrong"]["lanes"] == 0
    assert found["wrong"]["by_rule"]["gain"] == 0 > found["wrong"]["all_guesses"]["gain"]
    perfect = pytest.approx(found["perfect"]["by_rule"]["gain"], rel=1e-3)
    assert found["right"]["by_rule"]["gain"] == perfect and found["right"]["lanes"] == 1
    for one in long["predictors"].values():
        assert one["by_rule"]["gain"] >= -1e-9
    assert long["predictors"]["right"]["by_rule"]["gain"] > 2 * found["right"]["by_rule"]["gain"]
    report.plot({"simulated": {"a": short, "b": long}}, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_figures_of_an_arm_by_hand():
    """Two warm-up steps are left out, layers add up, bytes are those of a token."""
    step = {
        "lookups": [5, 5], "hits": [3, 1], "demand_fetches": [1, 2],
        "prefetches": [0, 2], "prefetches_wasted": [0, 1],
    }  # fmt: skip
    late = SimpleNamespace(**{name: np.array(value) for name, value in step.items()})
    early = SimpleNamespace(**{name: np.array([99, 99]) for name in step})
    arm = Arm.__new__(Arm)
    arm.tokens, arm.metrics = [np.zeros(2)], [early, early, late, late]
    found = decode.arm_effect(arm, 0.1, 0.05, bytes_of_expert=100)
    assert found["tokens_per_s"] == pytest.approx(20) and found["gain"] == -0.5
    assert found["hit_rate"] == 0.4 and found["prefetched_and_wanted"] == 0.5
    assert (found["moved_bytes_per_token"], found["wasted_bytes_per_token"]) == (250, 50)
