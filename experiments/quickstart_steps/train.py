"""Step 1 of the quickstart: train or resume, then score held-out bytes beside n-grams."""

import dataclasses
import math
import pathlib

import jax
import numpy as np

from configs.quickstart import QuickstartConfig
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.data.ngram import bits_per_byte, fit_ngram, scored_positions
from moejax.data.text import Corpus, check_batches, load_corpus, sample_windows
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.training.config import TrainConfig
from moejax.training.evaluate import evaluate
from moejax.training.loop import TrainResult, train


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What the first step hands to the others.

    Attributes:
        bits: held-out bits per byte of `model`, `bigram` and `trigram`, all three on the very same
            `scored_bytes` bytes; n-grams are counted on all training bytes.
        expert_load: int64 [L, E], assignments on those bytes.
    """

    corpus: Corpus
    model: DecoderConfig
    result: TrainResult
    bits: dict[str, float]
    scored_bytes: int
    expert_load: np.ndarray


def run_training(
    cfg: QuickstartConfig,
    workdir: str | pathlib.Path,
    *,
    corpus: Corpus | None = None,
    show_progress: bool = True,
) -> Trained:
    """Trains on all devices, or resumes from `workdir`/checkpoints, complete on return.

    The parameters that are returned lie on the first device. `corpus` is that of `cfg.data` when
    it is already loaded.
    """
    model = cfg.model.decoder()
    for name in ("eval_bytes", "eval_batch_size"):
        value = getattr(cfg, name)
        check(value >= 1, f"{name}={value} must be at least 1")
    corpus = corpus or load_corpus(cfg.data)
    check_batches(corpus, cfg.train.batch_size, cfg.train.seq_len)
    result = train(
        corpus.train.data,
        model,
        cfg.train,
        path=checkpoint_folder(workdir),
        mesh=training_mesh(model, cfg.train),
        show_progress=show_progress,
    )
    params = jax.device_put(result.state.params, jax.devices()[0])
    result = dataclasses.replace(result, state=dataclasses.replace(result.state, params=params))
    bits, expert_load, scored = score(cfg, corpus, result.state.params, model)
    return Trained(
        corpus=corpus,
        model=model,
        result=result,
        bits=bits,
        scored_bytes=scored,
        expert_load=expert_load,
    )


def training_mesh(model: DecoderConfig, cfg: TrainConfig) -> jax.sharding.Mesh:
    """Experts over as many devices as divide them and the batch."""
    both = math.gcd(model.moe.router.num_experts, cfg.batch_size)
    return make_mesh(expert=max(n for n in range(1, jax.device_count() + 1) if both % n == 0))


def checkpoint_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where the checkpoints of a run are."""
    return pathlib.Path(workdir) / "checkpoints"


def score(
    cfg: QuickstartConfig, corpus: Corpus, params: DecoderParams, model: DecoderConfig
) -> tuple[dict[str, float], np.ndarray, int]:
    """Bits per byte of the model and of the n-grams, the expert load, and how many bytes."""
    heldout, seq_len = corpus.heldout.data, cfg.train.seq_len
    starts = sample_windows(len(heldout), seq_len, cfg.eval_bytes)
    bits = {}
    bits["model"], expert_load = evaluate(
        params, heldout, starts, model, seq_len=seq_len, batch_size=cfg.eval_batch_size
    )
    positions = scored_positions(starts, seq_len)
    for name, order in (("bigram", 2), ("trigram", 3)):
        bits[name] = bits_per_byte(fit_ngram(corpus.train.data, order), heldout, positions)
    return bits, expert_load, len(positions)
