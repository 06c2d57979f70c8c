"""Step 3 on a small untrained decoder: what is recorded, from which files, and what comes back."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.quickstart_steps import predict
from moejax.core.errors import InputError
from moejax.data.routing_trace import load_trace
from moejax.data.text import Corpus, Span, Split
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import forward, init_decoder
from moejax.predictors.config import FitConfig, PredictConfig
from moejax.predictors.store import restore_predictor
from moejax.routing.config import RouterConfig

L, E, K = 3, 8, 2
MODEL = moe_decoder(
    vocab_size=64,
    d_model=16,
    num_layers=L,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    moe=MoEConfig(d_ff=8, router=RouterConfig(num_experts=E, top_k=K)),
)
CFG = PredictConfig(
    fit=FitConfig(horizon_steps=150, batch=128, hidden=32, embedding=8),
    window=16,
    fit_tokens=2048,
    heldout_files=3,
    heldout_tokens=64,
    record_batch=16,
    coverage_batch=2,
)


def split(rng: np.random.Generator, lengths: list[int], name: str) -> Split:
    data, spans = [], []
    for i, length in enumerate(lengths):
        start = sum(len(d) for d in data)
        spans.append(Span(f"{name}{i}.txt", start, start + length))
        data += [rng.integers(1, 64, length), np.zeros(1, np.int64)]
    return Split(data=np.concatenate(data).astype(np.uint8), spans=tuple(spans))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    return Corpus(
        train=split(rng, [3000, 2000], "train"), heldout=split(rng, [40, 100, 10, 90], "heldout")
    )


@pytest.fixture(scope="module")
def params():
    return init_decoder(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def ran(params, corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    return predict.run_prediction(params, MODEL, corpus, CFG, workdir, show=False), workdir


def test_heldout_windows_are_leading_pieces_of_whole_files(corpus):
    windows, names = predict.heldout_windows(corpus.heldout, CFG)
    # Two files reach 64 bytes; the longest other one gives 2 windows of 40 bytes.
    assert set(names[:2]) == {"heldout1.txt", "heldout3.txt"} and names[2] == "heldout0.txt"
    assert windows.shape == (4 + 4 + 2, 16)
    start = corpus.heldout.spans[0].start
    np.testing.assert_array_equal(
        windows[-2:].ravel(), corpus.heldout.data[start : start + 32].astype(np.int32)
    )


def test_recording_is_what_forward_records(params):
    windows = np.random.default_rng(1).integers(0, 64, (5, 16)).astype(np.int32)
    cfg = dataclasses.replace(CFG, record_batch=2)  # the last batch is partly filling
    recording = predict.record(params, MODEL, windows, cfg, "", False)
    assert recording.activations.shape == (L, 5, 16, 16)
    alone = jax.jit(forward, static_argnums=2)(params, windows, MODEL).record
    idx = np.asarray(alone.topk_idx).reshape(L, 5, 16, K)
    np.testing.assert_array_equal(recording.topk_idx, idx)
    hidden = np.asarray(alone.hidden).reshape(L, 5, 16, 16)
    np.testing.assert_allclose(recording.activations, hidden, rtol=1e-4, atol=1e-5)


def test_learned_beat_what_they_start_from(ran):
    """Random text and random weights: the token decides most of the routing, so it is learnable."""
    result, _ = ran
    mean = {name: one.mean_recall(K) for name, one in result.evaluations.items()}
    assert set(mean) == set(predict.LABELS)
    assert mean["learned"] > mean["next_gate"] + 0.03
    assert mean["history"] > mean["popularity"] + 0.2
    assert result.recall_at_k["learned"] == result.evaluations["learned"].recall[K]
    assert len(result.recall_at_k["learned"]) == L - 1
    assert {name: len(curve) for name, curve in result.losses.items()} == {
        "learned": 150,
        "history": 150,
    }


def test_workdir_holds_the_trace_and_the_predictors(ran):
    result, workdir = ran
    trace = load_trace(workdir / "routing_trace.npz")
    np.testing.assert_array_equal(trace.topk_idx, result.trace.topk_idx)
    assert trace.topk_idx.shape == (L, 160, K)
    assert trace.sequence_lengths.tolist() == [16] * 10
    assert trace.expert_bytes.tolist() == [3 * 16 * 8 * 4] * L
    for kind in ("residual", "history"):
        back = restore_predictor(workdir / "predictors" / kind)
        jax.tree.map(np.testing.assert_array_equal, back, getattr(result, kind))


def test_table_has_every_predictor(ran):
    console = Console(width=200, record=True, file=io.StringIO())
    predict.print_prediction(ran[0], console)
    text = console.export_text()
    for label in predict.LABELS.values():
        assert label in text


def test_text_shorter_than_a_window_is_refused(corpus):
    cfg = dataclasses.replace(CFG, window=128, heldout_tokens=128, fit_tokens=128)
    with pytest.raises(InputError, match="no held-out file has window=128 bytes; the longest.*100"):
        predict.heldout_windows(corpus.heldout, cfg)
    short = split(np.random.default_rng(0), [100], "short")
    with pytest.raises(InputError, match="101 training bytes, one window=128"):
        predict.fit_windows(short, cfg)
