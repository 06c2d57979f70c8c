"""A calibration decides levels and chunks of a run."""

import dataclasses

import pytest

from experiments.train_steps.advised import follow_calibration
from moejax.core.errors import InputError
from moejax.costmodel.advice import Calibration
from moejax.costmodel.links import Link
from tests.experiments.train_steps.runs import tiny_run

SLOW, FAST = Link(alpha_s=0.0, beta_s_per_byte=1e-6), Link(alpha_s=0.0, beta_s_per_byte=1e-9)
FOUND = Calibration(
    sizes={"data": 2, "expert": 4},
    exchange={("data",): SLOW, ("data", "expert"): SLOW, ("expert",): FAST},
    product=Link(alpha_s=0.0, beta_s_per_byte=0.0),
)
HIERARCHICAL = "train.dispatch.strategy=hierarchical"
OVER_DATA = "train.dispatch.over_data=True"


def test_the_run_gets_what_the_model_advises(tmp_path):
    cfg = tiny_run(tmp_path, HIERARCHICAL, OVER_DATA, "model.router.num_experts=8")
    advised, advice = follow_calibration(cfg, FOUND)
    assert advised.train.dispatch.levels == advice.choice.levels
    assert advised.train.dispatch.num_chunks == advice.num_chunks
    assert set(advice.choice.seconds) == {(("data", "expert"),), (("data",), ("expert",))}


def test_another_mesh_or_dispatch_is_refused(tmp_path):
    with pytest.raises(InputError, match="chooses levels and chunks of hierarchical, got 'gather'"):
        follow_calibration(tiny_run(tmp_path), FOUND)
    with pytest.raises(InputError, match="is of a mesh .*'data': 2.*, the run's is .'expert': 4"):
        follow_calibration(tiny_run(tmp_path, HIERARCHICAL), FOUND)
    smaller = dataclasses.replace(FOUND, sizes={"data": 2, "expert": 2})
    with pytest.raises(InputError, match="is of a mesh"):
        follow_calibration(tiny_run(tmp_path, HIERARCHICAL, OVER_DATA), smaller)
