"""What a checkpoint remembers of its run, and which runs it continues."""

import json

import jax.numpy as jnp
import pytest

from moejax.core.errors import InputError
from moejax.training.run_log import COLUMNS, RunLog, from_extra, to_extra
from moejax.training.state import StepMetrics
from tests.training.helpers import tiny_model, tiny_train


def log_of(steps):
    log = RunLog(crc32=7)
    for step in range(steps):
        values = {name: jnp.float32(step) for name in COLUMNS if name != "elapsed_secs"}
        log.append(StepMetrics(**values), elapsed_secs=10.0 + 2.0 * step)
    return log


def stored(log, cfg):
    return json.loads(json.dumps(to_extra(log, tiny_model(), cfg)))


def test_survives_json():
    log, cfg = log_of(3), tiny_train()
    again = from_extra(stored(log, cfg), "here", 7, tiny_model(), cfg)
    assert again == log and again.num_steps == 3
    assert again.last()["loss"] == 2.0 and again.history()["elapsed_secs"].tolist() == [10, 12, 14]


def test_speed_is_that_of_the_last_steps():
    cfg = tiny_train()  # eight tokens in a step
    assert [log_of(n).tokens_per_s(cfg) for n in (0, 1, 2, 30)] == [0.0, 0.0, 4.0, 4.0]


def test_where_arrays_lie_and_when_they_are_saved_may_change():
    free = dict(checkpoint_secs=1.0, fully_sharded=True, experts_memory="pinned_host")
    other = tiny_train(checkpoint_steps=None, **free)
    assert (
        from_extra(stored(log_of(1), tiny_train()), "here", 7, tiny_model(), other).num_steps == 1
    )


@pytest.mark.parametrize(
    "crc32, cfg, message",
    [
        (8, {}, r"here was trained on other data \(crc32 7, not 8\)"),
        (7, dict(seed=5), "here is of another run, train: seed=0, not 5"),
    ],
)
def test_refuses_another_run(crc32, cfg, message):
    extra = stored(log_of(1), tiny_train())
    with pytest.raises(InputError, match=message):
        from_extra(extra, "here", crc32, tiny_model(), tiny_train(**cfg))


def test_refuses_a_log_with_uneven_columns():
    extra = stored(log_of(2), tiny_train())
    extra["log"]["columns"]["loss"].pop()
    with pytest.raises(InputError, match="here: its log does not hold .* a list for each metric"):
        from_extra(extra, "here", 7, tiny_model(), tiny_train())
