"""How good a prediction is, in the units that offloading pays in. numpy.

All figures are per target layer and over valid tokens of held-out sequences; padding counts
nowhere. Ties go to the lower expert id, as in the gates. Every predictor at every horizon is judged
here: what a score was made from does not matter.

    recall          fraction of the chosen (token, expert) pairs among the token's m best scores
    exact_set       fraction of tokens whose m = k best are exactly the chosen k
    weight_mass     as recall, each pair weighed by its router weight
    wasted_bytes    bytes per token fetched for the m best and not chosen
    token_coverage, coverage_error, hot_rank    of a batch: see `moejax.predictors.coverage`

Axis letters:
    L  MoE layers    B  sequences    S  positions    K  experts per token    E  experts
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from moejax.core.errors import InputError, check
from moejax.predictors import next_gate
from moejax.predictors.coverage import batch_figures
from moejax.predictors.mlp import select
from moejax.predictors.recording import Recording
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one predictor; every list has one entry per target layer h .. L - 1."""

    recall: dict[int, list[float]]  # by m
    exact_set: list[float]
    weight_mass: dict[int, list[float]]  # by m; empty when the weights were not recorded
    wasted_bytes: dict[int, list[float]]  # by m, bytes per token
    token_coverage: dict[int, list[float]]  # by m of a batch
    coverage_error: dict[int, list[float]]  # by m of a batch
    hot_rank: dict[int, list[float]]  # by m of a batch

    def mean_recall(self, m: int) -> float:
        """Mean of recall@m over the target layers."""
        return float(np.mean(self.recall[m]))


def default_sizes(top_k: int, num_experts: int) -> tuple[int, ...]:
    """k, k + 2 and 2 k, as far as there are experts."""
    return tuple(sorted({min(m, num_experts) for m in (top_k, top_k + 2, 2 * top_k)}))


def evaluate(
    scores: np.ndarray,
    recording: Recording,
    *,
    expert_bytes: int | np.ndarray,
    horizon: int = 1,
    sizes: Sequence[int] | None = None,
    coverage_batch: int = 16,
) -> Evaluation:
    """Scores [L - h, B, S, E] against the choices of layers h .. L - 1, h being the horizon.

    Args:
        expert_bytes: bytes of one expert, or int64 [L - h] where layers differ.
        sizes: the m to report, by default k, k + 2 and 2 k.
        coverage_batch: sequences decoded side by side; the figures of a batch are reported at an
            eighth, a quarter and a half of the experts.
    """
    chosen = recording.topk_idx[horizon:]
    top_k, num_experts = chosen.shape[-1], scores.shape[-1]
    check(
        scores.shape[:-1] == chosen.shape[:-1],
        f"scores are {scores.shape}, the choices to predict are {chosen.shape}",
    )
    sizes = tuple(sizes or default_sizes(top_k, num_experts))
    check(
        1 <= min(sizes) and max(sizes) <= num_experts,
        f"sizes={sizes} must be between 1 and num_experts={num_experts}",
    )
    batched = batch_figures(scores, chosen, _batch_sizes(num_experts), coverage_batch)
    seen = (chosen < num_experts).any((0, 3))  # padding costs as much time as tokens
    rank, real = _ranks(scores[:, seen], chosen[:, seen])
    tokens = np.maximum(real.any(-1).sum(1), 1)

    def share(part: np.ndarray, whole: np.ndarray) -> list[float]:
        return (part.sum((1, 2)) / np.maximum(whole.sum((1, 2)), 1e-20)).tolist()

    hit = {m: rank < m for m in sizes}
    mass = {}
    if recording.topk_weights is not None:
        weights = np.where(real, recording.topk_weights[horizon:][:, seen], 0.0)
        mass = {m: share(hit[m] * weights, weights) for m in sizes}
    return Evaluation(
        recall={m: share(hit[m], real) for m in sizes},
        exact_set=((rank < top_k).all(-1).sum(1) / tokens).tolist(),
        weight_mass=mass,
        wasted_bytes={
            m: (expert_bytes * (m - hit[m].sum((1, 2)) / tokens)).tolist() for m in sizes
        },
        **dataclasses.asdict(batched),
    )


def _batch_sizes(num_experts: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, num_experts // part) for part in (8, 4, 2)}))


def mean_recall(scores: np.ndarray, chosen: np.ndarray) -> float:
    """Recall@k alone, a mean over layers, of scores [L', T, E] against the choices [L', T, K]."""
    rank, real = _ranks(scores, chosen)
    hit = rank < chosen.shape[-1]
    return float(np.mean(hit.sum((1, 2)) / np.maximum(real.sum((1, 2)), 1)))


def _ranks(scores: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank [..., K] of each chosen [..., K] in scores [..., E], E for padding; and what is real."""
    num_experts = scores.shape[-1]
    real = chosen < num_experts
    own = np.take_along_axis(scores, np.where(real, chosen, 0), axis=-1)
    rank = np.zeros(chosen.shape, np.int32)
    for e in range(num_experts):  # counting who is ahead is several times faster than sorting
        ahead = scores[..., e, None]
        rank += (ahead > own) | ((ahead == own) & (e < chosen))
    return np.where(real, rank, num_experts), real


def check_fresh_gate(recording: Recording, routers: RouterParams, cfg: RouterConfig) -> None:
    """The control of every look-ahead figure: a layer's own gate on its own input reads 100 %.

    Catches transposed routers, a forgotten correction bias or group mask, and activations of other
    tokens. Scores within 1e-5 of the k-th best count as chosen: the recording was compiled in
    another shape and may round differently. Raises `InputError` otherwise.
    """
    ask = jax.jit(next_gate.own_scores, static_argnames="cfg")
    for layer, (hidden, chosen) in enumerate(
        zip(recording.activations, recording.topk_idx, strict=True)
    ):
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = np.asarray(ask(select(routers, layer), flat, cfg=cfg))
        chosen = chosen.reshape(-1, cfg.top_k)
        real = chosen < cfg.num_experts
        best = np.sort(scores, axis=-1)[:, -cfg.top_k, None]
        got = np.take_along_axis(scores, np.where(real, chosen, 0), axis=-1)
        near = got >= best - 1e-5 * (1 + np.abs(best))
        read = float(near[real].mean())
        if read < 1.0:
            raise InputError(
                f"fresh-gate control reads {read:.2%} in MoE layer {layer}, not 100 %: the routers "
                "and the hidden states are not those that made the recorded choices"
            )
