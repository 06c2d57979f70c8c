"""Recorded routing as the work of decode steps: which experts serve how many tokens.

A step takes one token of each of B sequences. Where a trace has fewer than B, its tokens are cut
into B pieces of equal length, one after another, and the workload says so: pieces of one text are
more alike than texts are.

Axis letters:
    L  MoE layers      E  experts      N  steps      B  tokens of a step      K  experts per token
"""

import dataclasses

import numpy as np

from moejax.core.errors import check, check_seed
from moejax.data.routing_trace import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """The tokens of every step."""

    chosen: np.ndarray  # int32 [L, N, B, K], E where absent
    num_experts: int
    expert_bytes: np.ndarray  # int64 [L]
    is_cut: bool  # the trace has fewer than B sequences


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """What steps want, what a predictor says they will, and what was wanted before them."""

    tokens: np.ndarray  # int64 [N, L, E], of the step, that each expert serves
    predicted: np.ndarray  # [N, L, E], the same as a predictor sees it one layer ahead
    past: np.ndarray  # int64 [L, E], uses before the first step: seeds caches
    precision: np.ndarray  # float64 [m], how often its r-th best guess is wanted
    expert_bytes: np.ndarray  # int64 [L]
    dense_bytes: float  # of a layer's weights that every step reads
    bits_per_weight: float
    batch: int


def lanes_of_trace(trace: RoutingTrace, batch: int, *, max_steps: int | None = None) -> Lanes:
    """Steps of `batch` tokens; every token is taken as decoded, those of prompts too.

    Sequences go to the shortest lane so far, in order; steps end with the first lane that is empty.
    `InputError` when fewer than two steps come out.
    """
    check(batch >= 1, f"batch={batch} must be at least 1")
    lengths, starts = trace.sequence_lengths, trace.sequence_starts
    is_cut = len(lengths) < batch
    if is_cut:
        steps = trace.num_tokens // batch
        token = np.arange(steps)[:, None] + steps * np.arange(batch)
    else:
        lanes: list[list[int]] = [[] for _ in range(batch)]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            min(lanes, key=len).extend(range(start, start + length))
        steps = min(map(len, lanes))
        token = np.array([lane[:steps] for lane in lanes]).T
    check(
        steps >= 2,
        f"a trace of {trace.num_tokens} tokens in {len(lengths)} sequences has {steps} steps of "
        f"batch={batch}, want 2",
    )
    return Lanes(
        chosen=trace.topk_idx[:, token[:max_steps]],
        num_experts=trace.num_experts,
        expert_bytes=trace.expert_bytes,
        is_cut=is_cut,
    )


def make_workload(
    lanes: Lanes,
    past: slice,
    steps: slice,
    *,
    dense_bytes: float,
    bits_per_weight: float,
    recall: float,
    seed: int,
) -> Workload:
    """The work of some steps after others. `InputError` for a recall outside [0, 1].

    The predictor keeps each choice with probability `recall`; what it misses it replaces by a
    near-miss, an expert that the token did not choose, drawn in proportion to its past uses.
    `simulator.predictions` puts those of a real predictor in their place.
    """
    check(0 <= recall <= 1, f"recall={recall} is not between 0 and 1")
    check_seed(seed)
    e = lanes.num_experts
    chosen, before = lanes.chosen[:, steps], lanes.chosen[:, past]
    check(chosen.shape[1] > 0, f"steps {steps} of {lanes.chosen.shape[1]} are none")
    uses = count_tokens(before, e).sum(0)
    rng = np.random.default_rng(seed)
    # Gumbel noise on log frequencies draws without replacement.
    liking = np.log(uses + 0.5)[:, None, None] + rng.gumbel(size=(*chosen.shape[:3], e))
    liking = np.concatenate([liking, np.zeros((*chosen.shape[:3], 1))], axis=-1)
    np.put_along_axis(liking, chosen, -np.inf, axis=-1)
    near = np.argsort(-liking[..., :e], axis=-1)[..., : chosen.shape[-1]]
    kept = (rng.random(chosen.shape) < recall) | (chosen == e)
    return Workload(
        tokens=count_tokens(chosen, e),
        predicted=count_tokens(np.where(kept, chosen, near), e),
        past=uses,
        precision=np.full(e, recall),
        expert_bytes=lanes.expert_bytes,
        dense_bytes=dense_bytes,
        bits_per_weight=bits_per_weight,
        batch=chosen.shape[2],
    )


def count_tokens(chosen: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens per expert, int64 [N, L, E], of choices [L, N, B, K] with E where absent."""
    layers, steps = chosen.shape[:2]
    cell = np.arange(layers)[:, None] + layers * np.arange(steps)[None]
    flat = (cell[..., None] * (num_experts + 1) + chosen.reshape(layers, steps, -1)).ravel()
    counts = np.bincount(flat, minlength=steps * layers * (num_experts + 1))
    return counts.reshape(steps, layers, num_experts + 1)[..., :-1]
