"""What the cache of the recording run did, in the terms of a replay.

In a `route_trace v1` file `residency` belongs to a routed choice and `expert_bytes` to a read. When
several prompt tokens of one call want the same missing expert, each of their rows says residency 0
and only the first one carries the bytes. So a recorded miss is a row with bytes; counting rows with
residency 0 would count an expert once per token that wanted it.

Axis letters:
    C  calls
"""

import numpy as np

from moejax.data.route_csv import RecordedRouting
from moejax.simulator.calls import Calls
from moejax.simulator.replay import Outcome


def recorded_misses(recorded: RecordedRouting, calls: Calls) -> np.ndarray:
    """Distinct experts that the recording run read, int64 [C]; `calls` are those of its trace."""
    read = recorded.bytes_read > 0
    spans = zip(calls.layer, calls.tokens, strict=True)
    return np.array([read[layer, start:end].sum() for layer, (start, end) in spans], np.int64)


def calls_that_differ(misses: np.ndarray, outcome: Outcome) -> int:
    """Calls in which a replay and the recorded run loaded a different number of experts.

    0 means that the replay's policy and budget explain the recorded run completely.
    """
    return int(np.sum(misses != outcome.misses))
