"""The comparison trains every method that it names, and counts what it sends."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.sync_methods import MODEL, WORKERS, draw, methods, run_method
from moejax.data.text import Corpus, TextConfig, load_corpus
from moejax.models.decoder import init_decoder
from moejax.sync.fragments import size, whole
from moejax.training.config import TrainConfig

SMALL = dataclasses.replace(
    MODEL, num_layers=2, d_model=8, d_ff=8, num_experts=2, top_k=1, num_heads=1, num_kv_heads=1,
    head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def known():
    return methods(jax.eval_shape(lambda: init_decoder(jax.random.key(0), MODEL.decoder())))


def test_bytes_are_as_many_times_fewer_as_is_said(known):
    sent = {name: method().bytes_per_step for name, method in known.items()}
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), MODEL.decoder()))
    n = size(shapes, whole(shapes)[0])
    assert sent["synchronous"] == pytest.approx(2 * (WORKERS - 1) / WORKERS * 4 * n)
    fewer = {name: sent["synchronous"] / one for name, one in sent.items()}
    assert fewer["int8"] > 3.9 and fewer["top-k"] > 12
    assert fewer["local SGD"] == fewer["DiLoCo"] == pytest.approx(8)
    assert 5 < fewer["DreamDDP"] <= 8.001 and fewer["Streaming DiLoCo"] > 40
    assert 2 < fewer["CD-SGD"] == fewer["CD-SGD, no feedback"]


@pytest.mark.full
def test_a_method_trains(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    corpus: Corpus = load_corpus(TextConfig(path=str(text)))
    model = SMALL.decoder()
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), model))
    cfg = TrainConfig(batch_size=WORKERS, seq_len=4, horizon_steps=6, learning_rate=2e-2)
    (run,) = run_method(methods(shapes)["Streaming DiLoCo"](), model, corpus, cfg, 1)
    assert len(run["train"]) == 6 and run["train"][-1] < run["train"][0]
    assert 0 < run["heldout"] < np.log(256)
    draw({"a": [1.0, 2.0]}, {"a": 10.0}, str(tmp_path / "losses.png"))
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"
