"""Configs of the training program: every file makes one that trains, and wrong ones are refused."""

import pathlib

import jax
import pytest

from configs.run import RunConfig
from experiments.train_steps.load_config import load_config
from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.models.decoder import init_decoder

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_the_byte_model_is_of_the_size_that_its_file_says():
    cfg = load_config(str(CONFIGS / "byte_moe.py"))
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), cfg.model.decoder()))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 3_482_752
    assert (cfg.train.horizon_steps, cfg.train.checkpoint_steps) == (1000, 200)


def test_every_part_is_reached_by_set():
    cfg = load_config(str(CONFIGS / "byte_moe.py"))
    cfg = overlay(cfg, ["mesh.data=2", "mesh.expert=4", "model.shared_d_ff=8", "eval_steps=5"])
    assert isinstance(cfg, RunConfig) and cfg.mesh.size == 8 and cfg.eval_steps == 5
    assert cfg.model.decoder().moe.shared_d_ff == 8


@pytest.mark.parametrize(
    "assignment, message",
    [("log_steps=0", "log_steps=0 must be at least 1"), ("mesh.data=0", "axis data=0 must be")],
)
def test_refuses_wrong_overrides(assignment, message):
    with pytest.raises(InputError, match=message):
        overlay(load_config(str(CONFIGS / "byte_moe.py")), [assignment])
