"""The host link of a simulated step: prefetches and admissions in the gaps that misses leave.

A transfer that started is not interrupted; with an expert in parts that is one part. What does not
start before the router of the next layer has spoken does not start at all.
"""

import dataclasses

import numpy as np

from moejax.costmodel.admission import Swap
from moejax.costmodel.parts import parts_sent


@dataclasses.dataclass(kw_only=True)
class Link:
    """Seconds since the start of the run."""

    parts: int
    free_s: float = 0.0
    busy_s: float = 0.0
    queue: tuple[int, ...] = ()  # predicted experts of the next layer, best first
    is_firm: bool = False  # the whole queue goes, whoever waits
    arrived: int = 0  # experts of the queue that were sent
    arrived_parts: int = 0  # parts of the next one
    swap: Swap | None = None  # under way, in the background
    swap_parts: int = 0  # of it that were sent

    def occupy(self, start_s: float, seconds: float) -> None:
        """Demand: waits for what is under way, then runs."""
        self.free_s = max(self.free_s, start_s) + seconds
        self.busy_s += seconds

    def send_prefetches(self, until_s: float, fetch_s: float) -> None:
        """Sends of the queue what starts before `until_s`."""
        most = len(self.queue) * self.parts
        sent = most
        if not self.is_firm:
            sent = min(most, parts_sent(until_s - self.free_s, fetch_s, self.parts))
        self._send(sent, fetch_s)
        self.arrived, self.arrived_parts = divmod(sent, self.parts)

    def send_swap(self, until_s: float, fetch_s: float) -> bool:
        """Goes on with the swap until `until_s`; True when its expert has arrived."""
        left = self.parts - self.swap_parts
        sent = min(left, parts_sent(until_s - self.free_s, fetch_s, self.parts))
        self._send(sent, fetch_s)
        self.swap_parts += sent
        return sent == left

    def _send(self, parts: int, fetch_s: float) -> None:
        self.free_s += parts * fetch_s / self.parts
        self.busy_s += parts * fetch_s / self.parts


def clear_queue(link: Link) -> None:
    """Forgets the predictions for a layer whose router has spoken."""
    link.queue, link.is_firm, link.arrived, link.arrived_parts = (), False, 0, 0


def wanted_order(tokens: np.ndarray, scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Indices where `among` holds, most tokens first, of equals the higher score first."""
    index = np.flatnonzero(among)
    return index[np.lexsort((-scores[index], -tokens[index]))]
