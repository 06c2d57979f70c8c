"""Decoder configs."""

import dataclasses

import jax.numpy as jnp
import pytest

from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.layers.moe import MoEConfig
from moejax.models.config import Cycle, DecoderConfig, LayerGroup, group_layers, moe_decoder
from moejax.routing.config import RouterConfig

MOE = MoEConfig(d_ff=6, router=RouterConfig(num_experts=8, top_k=2))
CFG = moe_decoder(
    vocab_size=16,
    d_model=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    moe=MOE,
    tie_embeddings=True,
)


def test_layers_are_counted_over_groups():
    dense = LayerGroup(num_layers=2, d_ff=5)
    mixed = dataclasses.replace(CFG, groups=(dense, *CFG.groups, dense))
    assert (CFG.num_layers, CFG.num_moe_layers) == (3, 3)
    assert (mixed.num_layers, mixed.num_moe_layers) == (7, 3)
    assert mixed.moe == MOE and hash(mixed) != hash(CFG)
    assert CFG.tie_embeddings and CFG.attention.num_kv_heads == 2
    assert CFG.jnp_dtype == jnp.float32
    assert overlay(CFG, ["dtype=bfloat16"]).jnp_dtype == jnp.bfloat16


def test_one_kind_of_moe_layer_is_wanted():
    other = LayerGroup(num_layers=1, moe=dataclasses.replace(MOE, d_ff=7))
    same = LayerGroup(num_layers=1, moe=MOE)
    assert dataclasses.replace(CFG, groups=(*CFG.groups, same)).moe == MOE
    with pytest.raises(InputError, match="one kind of MoE layer, this decoder has 2"):
        _ = dataclasses.replace(CFG, groups=(*CFG.groups, other)).moe
    with pytest.raises(InputError, match="one kind of MoE layer, this decoder has 0"):
        _ = dataclasses.replace(CFG, groups=(LayerGroup(num_layers=1, d_ff=4),)).moe


def test_equal_layers_and_layers_in_turn_become_groups():
    a, b = LayerGroup(num_layers=1, d_ff=4), LayerGroup(num_layers=1, moe=MOE)
    (whole,) = group_layers([a] * 5)
    assert whole == LayerGroup(num_layers=5, d_ff=4)
    (cycle,) = group_layers([a, a, b] * 3)
    assert cycle == Cycle(repeats=3, groups=(dataclasses.replace(a, num_layers=2), b))
    lead = group_layers([b, a, a, b, b, a, a, b])
    for layers in ([a] * 5, [a, a, b] * 3, [b, a, a, b, b, a, a, b], [a, b, a, b, a]):
        config = dataclasses.replace(CFG, groups=group_layers(layers))
        assert config.layers == tuple(layers) and config.num_layers == len(layers)
    assert isinstance(lead[0], LayerGroup)


def test_a_shortcut_wants_both_mlps_and_a_layer_behind_it():
    first = LayerGroup(num_layers=1, moe=MOE, d_ff=4, shortcut=True)
    behind = LayerGroup(num_layers=1, d_ff=4)
    assert dataclasses.replace(CFG, groups=(first, behind)).num_moe_layers == 1
    for groups in ((first,), (first, first, behind)):
        with pytest.raises(InputError, match="shortcut wants a layer without one behind it"):
            dataclasses.replace(CFG, groups=groups)
    with pytest.raises(InputError, match="one layer with moe and d_ff, got num_layers=2"):
        dataclasses.replace(first, num_layers=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_layers=0, moe=MOE), "num_layers=0 must be at least 1"),
        (dict(num_layers=1), "wants either moe or d_ff, got moe=None and d_ff=0"),
        (dict(num_layers=1, moe=MOE, d_ff=4), "wants either moe or d_ff"),
        (dict(num_layers=1, d_ff=-4), "got moe=None and d_ff=-4"),
    ],
)
def test_a_group_is_one_kind_of_layer(fields, message):
    with pytest.raises(InputError, match=message):
        LayerGroup(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
        (dict(d_model=0), "d_model=0 must be at least 1"),
        (dict(groups=()), "at least one layer group"),
        (dict(dtype="float16"), "dtype='float16' is neither float32 nor bfloat16"),
    ],
)
def test_impossible_decoders_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CFG, **fields)
    assert isinstance(CFG, DecoderConfig)
