"""Recorded routing as predictors read it: sequences side by side, from a model or from a trace.

Predictors are fitted on some sequences and judged on others: `folds` splits by sequence (a prompt,
a file), never by token, because neighbouring tokens share their experts.

Axis letters:
    L  MoE layers    B  sequences    S  positions    D  model dim    K  experts per token
    E  experts, also the id of an absent choice      T  tokens of all sequences
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.core.errors import InputError, check
from moejax.data.routing_trace import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Routing of B sequences of S tokens, right-padded with `topk_idx == E` and weight 0. numpy.

    Model code records all of it. Public traces often hold the choices alone, in any order.
    """

    tokens: np.ndarray | None = None  # int32 [B, S]
    topk_idx: np.ndarray  # int32 [L, B, S, K]
    topk_weights: np.ndarray | None = None  # float32 [L, B, S, K]
    hidden: np.ndarray | None = None  # [L, B, S, D] gate inputs

    def __post_init__(self):
        shape = self.topk_idx.shape
        check(len(shape) == 4 and shape[0] >= 2, f"topk_idx is {shape}, not [L >= 2, B, S, K]")
        if self.tokens is not None:
            have = self.tokens.shape
            check(have == shape[1:3], f"tokens are {have}, topk_idx is {shape}")
        if self.topk_weights is not None:
            have = self.topk_weights.shape
            check(have == shape, f"topk_weights are {have}, topk_idx is {shape}")
        if self.hidden is not None:
            have = self.hidden.shape
            check(have[:-1] == shape[:-1], f"hidden is {have}, topk_idx is {shape}")

    @property
    def token_ids(self) -> np.ndarray:
        """`tokens`, which a table by token cannot do without."""
        if self.tokens is None:
            raise InputError("this predictor wants token ids, the recording has none")
        return self.tokens

    @property
    def weights(self) -> np.ndarray:
        """`topk_weights`, of a recording that has them."""
        if self.topk_weights is None:
            raise InputError("router weights are wanted, this recording has none")
        return self.topk_weights

    @property
    def activations(self) -> np.ndarray:
        """`hidden`, which look-ahead cannot do without."""
        if self.hidden is None:
            raise InputError("look-ahead wants hidden states, this recording has none")
        return self.hidden


def from_trace(trace: RoutingTrace) -> Recording:
    """The sequences of a trace side by side, padded to the longest."""
    lengths, layers = trace.sequence_lengths, trace.num_layers
    real = np.arange(lengths.max()) < lengths[:, None]  # [B, S], in the order of the trace
    idx = np.full((layers, *real.shape, trace.top_k), trace.num_experts, np.int32)
    idx[:, real] = trace.topk_idx
    weights = None
    if trace.topk_weights is not None:
        weights = np.zeros(idx.shape, np.float32)
        weights[:, real] = trace.topk_weights
    return Recording(topk_idx=idx, topk_weights=weights)


def take(recording: Recording, sequences: Sequence[int] | np.ndarray) -> Recording:
    """Some sequences of a recording, in the given order."""
    rows = np.asarray(sequences)
    check(rows.size > 0, "no sequences to take")
    tokens, weights, hidden = recording.tokens, recording.topk_weights, recording.hidden
    return Recording(
        tokens=None if tokens is None else tokens[rows],
        topk_idx=recording.topk_idx[:, rows],
        topk_weights=None if weights is None else weights[:, rows],
        hidden=None if hidden is None else hidden[:, rows],
    )


def folds(sequences: int, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (fit, held out) of sequence numbers; every sequence is held out once.

    Sizes differ by at most one; which sequence falls where depends on `seed` alone.
    """
    check(2 <= count <= sequences, f"folds={count} is not between 2 and sequences={sequences}")
    order = np.random.default_rng(seed).permutation(sequences)
    parts = [np.sort(order[fold::count]) for fold in range(count)]
    return [(np.setdiff1d(order, part), part) for part in parts]
