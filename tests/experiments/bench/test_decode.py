"""The decode benchmark: its own arm, and how seconds become figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from configs.shapes import get_shape
from experiments.bench import decode
from experiments.bench.decode_torch import Work
from moejax.core.mesh import make_mesh
from moejax.models.decoder import forward, init_decoder
from moejax.serving.engine import make_engine, split_experts


@pytest.fixture(autouse=True)
def parsed():
    flags.FLAGS(["decode", "--new_tokens=5"])
    yield
    flags.FLAGS.unparse_flags()


def test_generates_greedily_and_counts_the_experts_of_a_step():
    cfg = get_shape("tiny")
    params = init_decoder(jax.random.key(0), cfg)
    engine = make_engine(*split_experts(params, cfg), cfg, make_mesh(), capacity=12)
    work = Work(batch=2, prompt=7, new_tokens=5, repeats=1, vocab_size=cfg.vocab_size)
    prompt = jnp.asarray(work.tokens())
    _, _, tokens, used = decode.generate(engine, prompt, 5)
    whole = jnp.concatenate([prompt, jnp.asarray(tokens)[:, :-1]], axis=1)
    logits = forward(params, whole, cfg).logits[:, 6:]
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    # Two sequences want 2 to 4 experts in each of 2 layers.
    assert 4 <= used <= 8


def test_figures_are_ratios_of_minima_to_the_fastest_other():
    arms = {
        "moejax": dict(prefill=[2.0, 1.0], decode=[8.0, 4.0], tokens=[[1]], step_bytes=100),
        "slow": dict(prefill=[9.0], decode=[90.0], tokens=[[1]]),
        "fast": dict(prefill=[3.0, 4.0], decode=[20.0, 12.0], tokens=[[2]]),
    }
    found = decode.compare(arms, read_bytes_per_s=200.0)
    assert found["decode"]["of_minima"] == 3.0 and found["prefill"]["of_minima"] == 3.0
    assert found["decode"]["best_implementation"] == "fast"
    assert found["step_ms"] == 1000.0 and found["fraction_of_bandwidth"] == 0.5
    assert not found["tokens_identical"]
    figures = decode.make_figures({"float32": {"1": found}, "bfloat16": {"1": found}})
    assert figures["decode_speedup_vs_transformers"] == {"1": 3.0}
    assert figures["bfloat16"]["fraction_of_bandwidth"] == {"1": 0.5}
