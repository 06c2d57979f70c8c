"""The quickstart's config: what the issue asks of its size, and every knob by `--set`."""

import jax
import pytest

from configs.quickstart import get_config
from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.models.decoder import init_decoder


def test_default_is_a_small_mixture_of_ten_million_parameters():
    model = get_config().model.decoder()
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), model))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 10_512_000
    assert model.num_moe_layers == 6
    assert (model.moe.router.num_experts, model.moe.router.top_k) == (32, 4)


def test_every_part_is_reached_by_set():
    cfg = overlay(
        get_config(),
        [
            "model.router.num_experts=64",
            "train.horizon_secs=60",
            "train.horizon_steps=5",
            "data.path=/tmp/a=b",
            "eval_bytes=1024",
        ],
    )
    assert cfg.model.decoder().moe.router.num_experts == 64
    assert (cfg.train.horizon_secs, cfg.train.horizon_steps) == (60.0, 5)
    assert cfg.data.path == "/tmp/a=b" and cfg.eval_bytes == 1024


@pytest.mark.parametrize(
    "assignment,message",
    [
        ("model.num_expert=64", "has no field 'num_expert'"),
        ("model.router.num_experts=many", "wants int, got 'many'"),
        ("train.horizon_secs=0", "horizon_secs=0.0 must be positive"),
    ],
)
def test_refuses_wrong_overrides(assignment, message):
    with pytest.raises(InputError, match=message):
        overlay(get_config(), [assignment])


def test_refuses_knobs_that_do_not_fit_together():
    with pytest.raises(InputError, match="top_k=4 must be between 1 and num_experts=2"):
        overlay(get_config(), ["model.router.num_experts=2"])
    cfg = overlay(get_config(), ["model.num_heads=3"])
    with pytest.raises(InputError, match="num_heads=3"):
        cfg.model.decoder()
