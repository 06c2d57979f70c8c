"""Rope parameters against those of `transformers`, in both spellings of the config."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rope import context_of, read_rope, score_scale

DIM, THETA, LONG = 16, 5000.0, 256
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * i for i in range(DIM // 2)],
    long_factor=[2.0 + i for i in range(DIM // 2)],
    original_max_position_embeddings=64,
)
SCALINGS = {
    "none": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": YARN,
    "yarn_betas": dict(YARN, beta_fast=4.0, beta_slow=0.5, truncate=False),
    "yarn_mscale": dict(YARN, mscale=0.7, mscale_all_dim=1.2),
    "yarn_attention_factor": dict(YARN, attention_factor=1.3),
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_magnitude(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(SCALINGS[name])
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=LONG,
        rope_parameters=dict(scaling, rope_theta=THETA),
    )
    want, factor = 1 / THETA ** (np.arange(0, DIM, 2) / DIM), 1.0
    if name != "none":
        want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    new = Fields(
        dict(rope_parameters=dict(scaling, rope_theta=THETA), max_position_embeddings=LONG)
    )
    scaling["type"] = scaling.pop("rope_type")
    old = Fields(dict(rope_theta=THETA, rope_scaling=scaling, max_position_embeddings=LONG))
    for fields in (new, old):
        cfg = read_rope(fields, DIM)
        got = THETA ** (-np.arange(0, DIM, 2) / DIM) / np.asarray(cfg.divisors or 1.0)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(cfg.magnitude, factor, rtol=1e-6)


def test_partial_rotation_and_contexts():
    fields = Fields(dict(partial_rotary_factor=0.5, max_position_embeddings=LONG))
    assert read_rope(fields, DIM).dim == DIM // 2 and context_of(fields) == LONG
    assert read_rope(Fields(dict(rope_theta=7.0)), DIM).theta == 7.0
    stretched = Fields(dict(rope_parameters=LONGROPE, max_position_embeddings=LONG))
    assert context_of(stretched) == 64


def test_scores_of_latent_attention_carry_the_magnitude_twice():
    plain = Fields(dict(max_position_embeddings=LONG))
    assert score_scale(plain, 16) == 0.25
    yarn = Fields(dict(rope_parameters=dict(YARN, mscale_all_dim=1.0)))
    np.testing.assert_allclose(score_scale(yarn, 16), 0.25 * (0.1 * np.log(8) + 1) ** 2)


def test_an_unknown_scaling_is_refused():
    with pytest.raises(InputError, match="rope scaling 'ntk' is not supported, only linear, yarn"):
        read_rope(Fields(dict(rope_parameters=dict(rope_type="ntk"))), DIM)


def test_two_spellings_must_agree():
    both = dict(rope_parameters=YARN, rope_scaling={"factor": YARN["factor"]})
    assert read_rope(Fields(both | dict(max_position_embeddings=LONG)), DIM).divisors
    both["rope_scaling"] = {"rope_type": "ntk"}
    with pytest.raises(InputError, match="rope_type='yarn' of rope_parameters is 'ntk' in rope_sc"):
        read_rope(Fields(both), DIM)
