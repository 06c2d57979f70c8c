"""Configs become the plans of their methods, and say what they send."""

import jax
import jax.numpy as jnp
import pytest

from moejax.collectives.codecs import BlockQuant
from moejax.core.errors import InputError
from moejax.sync.config import SyncConfig
from moejax.sync.exchange import make_exchange, make_plan, sent_per_step
from moejax.sync.plan import Outer, cd_sgd, diloco, local_sgd
from moejax.sync.reduce import sent_bytes

# Three layers of 40 weights, and 10 others.
SHAPES = {
    "groups": ({"w": jax.ShapeDtypeStruct((3, 40), jnp.float32)},),
    "head": jax.ShapeDtypeStruct((10,), jnp.float32),
}
FULL = sent_bytes(130, 4)


def test_plans_are_those_of_the_methods():
    plans = {
        method: make_plan(SyncConfig(method=method, every=4), SHAPES)
        for method in ("local_sgd", "diloco", "streaming_diloco", "dream_ddp")
    }
    assert plans["local_sgd"][0] == local_sgd(4)
    assert plans["diloco"][0] == diloco(4, Outer(learning_rate=0.7, momentum=0.9))
    streaming, fragments = plans["streaming_diloco"]
    assert streaming.when == ((0,), (2,)) and streaming.codec == BlockQuant(4, 32)
    assert len(fragments) == 2
    dream, layers = plans["dream_ddp"]
    assert len(layers) == len(dream.when) == 3 and dream.overlap and dream.outer is None
    cd = make_plan(SyncConfig(method="cd_sgd", threshold=0.5, feedback=False), SHAPES)[0]
    assert not cd.feedback and cd.codec == cd_sgd(0.5, 8).codec


def test_bytes_are_those_of_the_schedules():
    assert sent_per_step(SyncConfig(method="gradients"), SHAPES, 4) == FULL
    int8 = sent_per_step(SyncConfig(method="gradients", codec="int8"), SHAPES, 4)
    assert int8 == sent_bytes(130, 4, BlockQuant())
    assert sent_per_step(SyncConfig(method="local_sgd", every=4), SHAPES, 4) == FULL / 4
    cfg = SyncConfig(method="cd_sgd", exact_every=4)
    assert sent_per_step(cfg, SHAPES, 4) == FULL / 4 + 0.75 * 6 * 9  # chunks of 33, two bits each


def test_what_has_no_plan_is_refused():
    for method in ("none", "gradients"):
        with pytest.raises(InputError, match=f"method='{method}' has no plan of weights"):
            make_plan(SyncConfig(method=method), SHAPES)
    with pytest.raises(InputError, match="count=4 must be between 1 and 3 fragments"):
        make_exchange(SyncConfig(method="streaming_diloco", num_fragments=4), SHAPES, ("data",))
