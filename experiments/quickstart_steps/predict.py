"""Step 3 of the quickstart: record routing, fit predictors on training files, compare on others.

Axis letters:
    N  windows    S  positions of a window    L  MoE layers
"""

import dataclasses
import pathlib
import time
from functools import partial

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moejax.core.errors import check
from moejax.data.routing_trace import RoutingTrace, from_recorded, save_trace
from moejax.data.text import Corpus, Split
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, Record, forward
from moejax.predictors import baselines, fit, history, residual
from moejax.predictors.config import PredictConfig
from moejax.predictors.evaluate import Evaluation, check_fresh_gate, evaluate
from moejax.predictors.features import recorded_features
from moejax.predictors.history import HistoryParams
from moejax.predictors.mlp import select
from moejax.predictors.recording import Recording
from moejax.predictors.residual import ResidualParams
from moejax.predictors.store import save_predictor
from moejax.routing.gates import RouterParams
from moejax.serving.prediction import stack_routers
from moejax.training.progress import progress_bar

LABELS = {
    "learned": "learned look-ahead",
    "history": "history (no activations)",
    "next_gate": "next gate",
    "token_table": "token-id table",
    "bigram": "cross-layer bigram",
    "previous_token": "previous token",
    "popularity": "popularity",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionResult:
    """Fitted predictors and how all of them do on held-out files."""

    residual: ResidualParams
    history: HistoryParams
    evaluations: dict[str, Evaluation]  # by the names of `LABELS`
    losses: dict[str, list[float]]  # fitting curves of "learned" and "history"
    trace: RoutingTrace  # held-out routing
    top_k: int
    heldout_files: tuple[str, ...]
    secs: dict[str, float]  # where the time went

    @property
    def recall_at_k(self) -> dict[str, list[float]]:
        """Recall@k per target layer 1 .. L - 1, by predictor."""
        return {name: result.recall[self.top_k] for name, result in self.evaluations.items()}


def run_prediction(
    params: DecoderParams,
    model: DecoderConfig,
    corpus: Corpus,
    cfg: PredictConfig,
    workdir: pathlib.Path,
    *,
    show: bool = True,
) -> PredictionResult:
    """Records, fits, evaluates; writes `routing_trace.npz` and `predictors/` into `workdir`.

    Fit and evaluation data never share a file: they come from the two sides of `corpus`. Raises
    `InputError` when the routers do not reproduce the recorded choices or the text is too short.
    """
    clock = _Clock()
    routers, router_cfg = stack_routers(params, model), model.moe.router
    windows, files = heldout_windows(corpus.heldout, cfg)
    held_out = record(params, model, windows, cfg, "recording held-out files", show)
    check_fresh_gate(held_out, routers, router_cfg)
    train = record(params, model, fit_windows(corpus.train, cfg), cfg, "recording training", show)
    clock.lap("record")
    with progress_bar("fitting look-ahead", show=show) as update:
        learned, learned_losses = fit.fit_residual(
            train, routers, router_cfg, cfg.fit, progress=_describe(update)
        )
    clock.lap("fit_learned")
    with progress_bar("fitting history", show=show) as update:
        past, past_losses = fit.fit_history(
            train, router_cfg.num_experts, model.vocab_size, cfg.fit, progress=_describe(update)
        )
    clock.lap("fit_history")
    scores = score_all(train, held_out, learned, past, routers, model)
    trace = heldout_trace(held_out, model, files)
    bytes_per_expert = int(trace.expert_bytes[0])
    evaluations = {
        name: evaluate(
            scores[name],
            held_out,
            expert_bytes=bytes_per_expert,
            coverage_batch=cfg.coverage_batch,
        )
        for name in LABELS
    }
    clock.lap("evaluate")
    save_trace(workdir / "routing_trace.npz", trace)
    save_predictor(workdir / "predictors" / "residual", learned)
    save_predictor(workdir / "predictors" / "history", past)
    clock.lap("save")
    return PredictionResult(
        residual=learned,
        history=past,
        evaluations=evaluations,
        losses={"learned": learned_losses, "history": past_losses},
        trace=trace,
        top_k=router_cfg.top_k,
        heldout_files=files,
        secs=clock.laps,
    )


def fit_windows(split: Split, cfg: PredictConfig) -> np.ndarray:
    """int32 [N, S]: `fit_tokens` of text, in windows at random places of the training side."""
    last = len(split.data) - cfg.window
    check(last >= 0, f"corpus too small: {len(split.data)} training bytes, one window={cfg.window}")
    rng = np.random.default_rng((cfg.seed, 0))
    starts = rng.integers(0, last + 1, cfg.fit_tokens // cfg.window)
    return split.data[starts[:, None] + np.arange(cfg.window)].astype(np.int32)


def heldout_windows(split: Split, cfg: PredictConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32 [N, S] windows, file after file and in order inside a file, and the files' names.

    The leading `heldout_tokens` of `heldout_files` files, drawn at random from those that have as
    many; where too few do, the longest of the others make up the number.
    """
    sizes = np.array([span.stop - span.start for span in split.spans])
    order = np.random.default_rng((cfg.seed, 1)).permutation(len(sizes))
    order = order[np.argsort(-np.minimum(sizes[order], cfg.heldout_tokens), kind="stable")]
    chosen = [int(i) for i in order[: cfg.heldout_files] if sizes[i] >= cfg.window]
    check(
        bool(chosen),
        f"no held-out file has window={cfg.window} bytes; the longest has {sizes.max(initial=0)}",
    )
    windows = []
    for i in chosen:
        count = min(int(sizes[i]), cfg.heldout_tokens) // cfg.window
        text = split.data[split.spans[i].start :][: count * cfg.window]
        windows.append(text.reshape(count, cfg.window))
    names = tuple(split.spans[i].name for i in chosen)
    return np.concatenate(windows).astype(np.int32), names


def record(
    params: DecoderParams,
    model: DecoderConfig,
    windows: np.ndarray,
    cfg: PredictConfig,
    name: str,
    show: bool,
) -> Recording:
    """Runs the model over windows int32 [N, S] and keeps what its MoE layers saw and chose."""
    count, window = windows.shape
    parts: dict[str, np.ndarray] = {}
    with progress_bar(name, show=show) as update:
        for first in range(0, count, cfg.record_batch):
            rows = np.arange(first, first + cfg.record_batch)
            chunk = _record(params, windows[np.minimum(rows, count - 1)], model)
            rows = rows[rows < count]
            for field in ("hidden", "topk_idx", "topk_weights"):
                value = np.asarray(getattr(chunk, field))
                value = value.reshape(len(value), cfg.record_batch, window, -1)
                shape = (len(value), count, *value.shape[2:])
                whole = parts.setdefault(field, np.empty(shape, value.dtype))
                whole[:, rows] = value[:, : len(rows)]
            done = first + len(rows)
            update(done / count, f"{done * window:,} tokens")
    return Recording(tokens=windows, **parts)


@partial(jax.jit, static_argnames="model")
def _record(params: DecoderParams, tokens: jax.Array, model: DecoderConfig) -> Record:
    return forward(params, tokens, model).record


def score_all(
    train: Recording,
    held_out: Recording,
    learned: ResidualParams,
    past: HistoryParams,
    routers: RouterParams,
    model: DecoderConfig,
) -> dict[str, np.ndarray]:
    """Scores [L - 1, N, S, E] of every predictor on the held-out recording."""
    cfg = model.moe.router
    next_gate = baselines.next_gate_scores(held_out, routers, cfg)
    correct = jax.jit(residual.one_layer)
    look_ahead = np.empty_like(next_gate)
    for layer, base in enumerate(next_gate):
        hidden = held_out.activations[layer].reshape(-1, model.d_model)
        look_ahead[layer].flat = correct(
            select(learned, layer), hidden, base.reshape(len(hidden), -1)
        )
    features = recorded_features(held_out, past.popularity, vocab_size=model.vocab_size)
    from_history = np.asarray(jax.jit(history.scores)(past, features)).reshape(next_gate.shape)
    experts = cfg.num_experts
    return {
        "learned": look_ahead,
        "history": from_history,
        "next_gate": next_gate,
        "token_table": baselines.token_table_scores(train, held_out, experts),
        "bigram": baselines.bigram_scores(train, held_out, experts),
        "previous_token": baselines.previous_token_scores(train, held_out, experts),
        "popularity": baselines.popular_scores(train, held_out, experts),
    }


def heldout_trace(
    held_out: Recording, model: DecoderConfig, files: tuple[str, ...]
) -> RoutingTrace:
    """The held-out routing as a trace with one sequence per window, every token a decode step."""
    layers, count, window, top_k = held_out.topk_idx.shape
    itemsize = model.jnp_dtype.itemsize
    return from_recorded(
        held_out.topk_idx.reshape(layers, count * window, top_k),
        topk_weights=held_out.weights.reshape(layers, count * window, top_k),
        num_experts=model.moe.router.num_experts,
        expert_bytes=3 * model.d_model * model.moe.d_ff * itemsize,
        sequence_lengths=np.full(count, window),
        meta={"source": "quickstart, held-out files", "files": list(files)},
    )


def print_prediction(result: PredictionResult, console: Console | None = None) -> None:
    """One table of recall@k for every target layer, one of the rest of the suite at the mean."""
    console = console or Console()
    k, first = result.top_k, next(iter(result.evaluations.values()))
    files = len(result.heldout_files)
    layers = [f"layer {layer}" for layer in range(1, len(first.exact_set) + 1)]
    recall = _table(f"recall@{k} on {files} held-out files", [*layers, "mean"])
    sizes, half = sorted(first.recall), max(first.token_coverage)
    headings = [*(f"@{m}" for m in sizes), "exact", "mass", f"cover@{half}", "wasted"]
    title = f"means: recall@m, exact set, weight mass@{k}, coverage; wasted@{k} in KiB/token"
    suite = _table(title, headings)
    for name, label in LABELS.items():
        one = result.evaluations[name]
        cells = [*one.recall[k], one.mean_recall(k)]
        recall.add_row(label, *(f"{value:.3f}" for value in cells))
        cells = [one.mean_recall(m) for m in sizes]
        cells += [np.mean(v) for v in (one.exact_set, one.weight_mass[k], one.token_coverage[half])]
        wasted = sum(one.wasted_bytes[k]) / 1024
        suite.add_row(label, *(f"{value:.3f}" for value in cells), f"{wasted:,.0f}")
    console.print(recall)
    console.print(suite)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("predictor", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _describe(update):
    """A fit's progress as the bar's fraction and text."""

    def progress(fraction: float, step: int, loss: float) -> None:
        update(fraction, f"step {step}  loss {loss:.2f}")

    return progress


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
