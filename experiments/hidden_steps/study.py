"""The steps of `experiments/hidden_predictors.py` in order."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console

from configs.hidden_predictors import HiddenConfig
from experiments.hidden_steps import report
from experiments.hidden_steps.cost import costs
from experiments.hidden_steps.predict import HORIZONS, fit_all, score_all
from experiments.hidden_steps.quality import score_domains
from experiments.hidden_steps.shift import stream
from experiments.hidden_steps.states import Recorded, check_equal_layers, record
from experiments.hidden_steps.text import fit_windows, heldout_starts, windows_at
from moejax.core.errors import InputError, check
from moejax.core.mesh import make_mesh
from moejax.data.bpe import load_tokens
from moejax.data.domains import DomainsConfig
from moejax.data.text import Corpus, TextConfig
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.restore import restore_params
from moejax.predictors.evaluate import check_fresh_gate, evaluate
from moejax.predictors.fit import Progress
from moejax.predictors.fit_hidden import fit_llapor
from moejax.predictors.llapor import layer_groups
from moejax.predictors.recording import take
from moejax.predictors.store import save_predictor
from moejax.routing.gates import RouterParams
from moejax.serving.prediction import stack_routers
from moejax.training.progress import Update, progress_bar


def load_model(workdir: pathlib.Path) -> tuple[DecoderParams, DecoderConfig]:
    """The newest weights of the run, on one device."""
    params, model = restore_params(
        workdir / "checkpoints", mesh=make_mesh(), expert_memory="device"
    )
    check_equal_layers(model)
    return params, model


def load_corpus(workdir: pathlib.Path, data: DomainsConfig | TextConfig) -> Corpus:
    """The tokens that the run was trained on and those that it was not."""
    if not isinstance(data, DomainsConfig):
        raise InputError("this run's config reads bytes; hidden_predictors wants several domains")
    check((workdir / "corpus.npz").exists(), f"{workdir} has no corpus.npz; train there first")
    return load_tokens(data, workdir)


def record_all(
    params: DecoderParams, model: DecoderConfig, corpus: Corpus, cfg: HiddenConfig
) -> tuple[Recorded, Recorded]:
    """Of training files and of held-out files."""
    fit = fit_windows(corpus.train, cfg.fit_tokens, cfg.window, cfg.seed)
    train = _record_windows(params, model, fit, "training files", cfg)
    return train, record_heldout(params, model, corpus, cfg)


def record_heldout(
    params: DecoderParams, model: DecoderConfig, corpus: Corpus, cfg: HiddenConfig
) -> Recorded:
    """Of held-out files alone; raises where the model's own gate does not foretell its choices."""
    starts = heldout_starts(corpus.heldout, cfg.heldout_tokens, cfg.window, cfg.seed)
    windows = {name: windows_at(corpus.heldout, at, cfg.window) for name, at in starts.items()}
    held = _record_windows(params, model, windows, "held-out files", cfg)
    check_fresh_gate(held.routing, stack_routers(params, model), model.moe.router)
    return held


def _record_windows(params, model, windows: dict[str, np.ndarray], label, cfg) -> Recorded:
    with progress_bar(f"recording {label}") as update:
        every = np.concatenate([*windows.values()])
        routing, entering = record(params, model, every, cfg.record_batch, update)
    names = np.repeat([*windows], [len(one) for one in windows.values()])
    return Recorded(routing=routing, entering=entering, domains=names)


def follow_shift(
    train: Recorded, held: Recorded, routers: RouterParams, cfg: HiddenConfig
) -> dict[str, Any]:
    """LLaPor fitted to the first domain only, on held-out text of every domain, with tuning."""
    first = train.domains[0]
    one = take(train.routing, np.flatnonzero(train.domains == first))
    with progress_bar(f"fitting LLaPor to {first} alone") as update:
        params, _ = fit_llapor(
            one,
            routers.w_router.shape[-1],
            cfg.llapor,
            cfg.fit,
            w_router=routers.w_router,
            progress=describe(update),
        )
    found = {}
    for domain in dict.fromkeys(held.domains.tolist()):
        asked = take(held.routing, np.flatnonzero(held.domains == domain))
        found[domain] = stream(params, asked, cfg.tuning)
    return {"fitted_to": str(first), "domains": found}


def describe(update: Update) -> Progress:
    """A fit's progress as the bar's fraction and text."""

    def progress(fraction: float, step: int, loss: float) -> None:
        update(fraction, f"step {step}  loss {loss:.2f}")

    return progress


@contextlib.contextmanager
def fitting(name: str) -> Iterator[Progress]:
    """A progress bar for the fit of a predictor."""
    with progress_bar(f"fitting {name}") as update:
        yield describe(update)


def study(
    workdir: pathlib.Path, data: DomainsConfig | TextConfig, cfg: HiddenConfig, console: Console
) -> dict[str, Any]:
    """All steps; the report's figures."""
    corpus = load_corpus(workdir, data)
    params, model = load_model(workdir)
    size = int(max(corpus.train.data.max(), corpus.heldout.data.max())) + 1
    check(size <= model.vocab_size, f"{size} tokens, but the model knows {model.vocab_size}")
    quality = score_domains(params, model, corpus, cfg)
    report.print_quality(console, quality)
    train, held = record_all(params, model, corpus, cfg)
    routers, expert = stack_routers(params, model), model.moe
    del params
    fitted = fit_all(train, routers, model, cfg, fitting)
    for name, one in fitted.items():
        save_predictor(workdir / "predictors" / name, one)
    scores = score_all(fitted, train.routing, held, routers, model)
    expert_bytes = 3 * model.d_model * expert.d_ff * model.jnp_dtype.itemsize
    judged = {
        name: evaluate(
            scores[name], held.routing, expert_bytes=expert_bytes, horizon=HORIZONS[name]
        )
        for name in HORIZONS
    }
    return {
        "model": dict(
            layers=model.num_moe_layers,
            experts=expert.num_experts,
            top_k=expert.router.top_k,
            d_model=model.d_model,
        ),
        "quality": quality,
        "groups": {name: [*group] for name, group in layer_groups(model.num_moe_layers).items()},
        **report.figures_of(judged, scores, held, expert.router.top_k),
        "cost": costs(fitted, routers, model),
        "tuning": follow_shift(train, held, routers, cfg),
    }
