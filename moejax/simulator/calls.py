"""The sequence of cache calls that a recorded trace makes.

One call per layer and pass, in layer order. The prompt of a sequence is one pass over all its
tokens; every later token is a pass of its own. Within a call a distinct expert is one lookup; a
repeat only refreshes its recency. The cache stays warm from one sequence to the next.

Axis letters:
    C  calls      W  most distinct experts of one call      L  MoE layers      E  experts
    N  granules, (layer, expert) pairs in layer-major order: N = L * E
"""

import dataclasses

import numpy as np

from moejax.data.routing_trace import DECODE, RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calls:
    """Calls in the order in which they happen."""

    layer: np.ndarray  # int32 [C]
    is_decode: np.ndarray  # bool [C]
    granules: np.ndarray  # int32 [C, W], distinct, in order of their last touch, N past the end
    next_use: np.ndarray  # int32 [C, W], the next call that uses the granule, C for never
    tokens: np.ndarray  # int64 [C, 2], first token of the pass and one past its last
    expert_bytes: np.ndarray  # int64 [L]
    num_experts: int
    top_k: int

    @property
    def lookups(self) -> np.ndarray:
        """int64 [C], distinct experts of every call."""
        return np.sum(self.granules < len(self.expert_bytes) * self.num_experts, axis=1)

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that one token uses, over all layers.

        The cliff of global LRU: with a budget a layer's share below this, every expert that a token
        used is evicted before its layer comes round again, and nothing ever hits.
        """
        return self.top_k * int(self.expert_bytes.sum())


def calls_of_trace(trace: RoutingTrace) -> Calls:
    """Unrolls `trace` into calls. A layer that saw none of a pass's tokens makes no call."""
    n = trace.num_layers * trace.num_experts
    layers, phases, spans, rows = [], [], [], []
    for tokens, phase in _passes(trace):
        for layer in range(trace.num_layers):
            experts = trace.topk_idx[layer, tokens].reshape(-1)  # token-major, then slot
            experts = experts[experts < trace.num_experts] + layer * trace.num_experts
            if experts.size:
                newest_first = dict.fromkeys(experts[::-1].tolist())
                layers.append(layer)
                phases.append(phase == DECODE)
                spans.append((tokens.start, tokens.stop))
                rows.append(list(newest_first)[::-1])
    width = max(map(len, rows), default=0)
    granules = np.full((len(rows), width), n, np.int32)
    next_use = np.full((len(rows), width), len(rows), np.int32)
    upcoming: dict[int, int] = {}
    for call in range(len(rows) - 1, -1, -1):
        row = rows[call]
        granules[call, : len(row)] = row
        next_use[call, : len(row)] = [upcoming.get(granule, len(rows)) for granule in row]
        upcoming.update(dict.fromkeys(row, call))
    return Calls(
        layer=np.array(layers, np.int32),
        is_decode=np.array(phases, bool),
        granules=granules,
        next_use=next_use,
        tokens=np.array(spans, np.int64).reshape(-1, 2),
        expert_bytes=trace.expert_bytes.astype(np.int64),
        num_experts=trace.num_experts,
        top_k=trace.top_k,
    )


def _passes(trace: RoutingTrace):
    """Yields (tokens of the pass as a slice, phase)."""
    phase = trace.phase
    for start, length, prompt in zip(
        trace.sequence_starts, trace.sequence_lengths, trace.prompt_lengths, strict=True
    ):
        if prompt:
            yield slice(start, start + prompt), phase[start]
        for token in range(start + prompt, start + length):
            yield slice(token, token + 1), phase[token]
