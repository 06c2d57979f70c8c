"""Who serves the misses of a layer, and what to prefetch for the next: PreSched.

PreScope (arXiv 2509.23638, section "PreSched") plans two layers at once: which missing experts the
link moves, which the host computes, and which of the next layer's predicted experts the link moves
while the host still works. Its equations are not public; this is a reconstruction from its premises
(one transfer at a time, transfers are not interrupted, demand before prefetch, a moved expert costs
the same for any number of rows while the host's time grows with them):

    T(x) = max(device and link with x experts moved, sum over the rest of t_host)
    choose x, y to minimise T_now(x) + attention + T_next without its y first predicted misses,
    with the y transfers within what the link has left: y tau <= T_now(x) + attention - x tau

Since moving saves most where the host is slowest, the experts to move are the first x when sorted
by host time, and one sweep over x with suffix sums finds the optimum: O(n).
"""

import dataclasses

import numpy as np

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerWork:
    """The misses of one layer. Seconds."""

    host_s: np.ndarray  # float64 [n], each missing expert on the host, longest first
    fetch_s: float  # tau
    expert_s: float = 0.0  # the device's share in an expert that was moved
    device_s: float = 0.0  # what the device does anyway: cached experts
    link_delay_s: float = 0.0  # from the router to the link's being free

    def __post_init__(self):
        host_s = self.host_s
        descending = host_s.ndim == 1 and bool((host_s[1:] <= host_s[:-1]).all())
        check(descending, f"host times {self.host_s.tolist()[:6]} are not longest first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """How misses are served: the first `moved` by the link, a share of the next, else the host."""

    moved: int
    share: float  # of the columns of expert number `moved`; 0 when experts stay whole
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLayers:
    """A plan for this layer and the next."""

    moved: int
    prefetched: int
    now_s: float
    next_s: float


def device_path_s(work: LayerWork, moved: np.ndarray) -> np.ndarray:
    """When the device is done with cached and moved experts; the link feeds it one by one."""
    arrived = work.link_delay_s + moved * work.fetch_s + work.expert_s
    products = moved * work.expert_s
    first = work.link_delay_s + work.fetch_s + products
    ends = np.maximum(np.maximum(arrived, first), work.device_s + products)
    ends[moved == 0] = work.device_s
    return ends


def serve_whole(work: LayerWork) -> Serving:
    """The fastest division of whole experts between link and host."""
    if len(work.host_s) == 0:
        return Serving(moved=0, share=0.0, seconds=work.device_s)
    return _best_whole(*_ends(work))


def serve_columns(work: LayerWork) -> Serving:
    """The same with one expert split by columns: link and host end together.

    No slower than `serve_whole`; without device time it is the bound for divisible work.
    """
    n = len(work.host_s)
    if n == 0:
        return Serving(moved=0, share=0.0, seconds=work.device_s)
    paths, remaining = _ends(work)
    best = _best_whole(paths, remaining)
    # The optimum splits the expert at which the host's side stops being the later one.
    below = int(np.argmax(paths >= remaining))
    for moved in range(max(0, below - 1), min(below + 1, n)):
        host, left = float(work.host_s[moved]), float(remaining[moved])
        link = work.link_delay_s + moved * work.fetch_s + work.expert_s
        device = work.device_s + moved * work.expert_s
        # Link and device end later with the share, the host earlier: the first meeting is best.
        with_link = (left - link) / (work.fetch_s + host)
        with_device = (left - device) / (work.expert_s + host)
        share = min(1.0, max(0.0, min(with_link, with_device)))
        seconds = max(
            float(paths[moved]),
            link + share * work.fetch_s,
            device + share * work.expert_s,
            left - share * host,
        )
        if seconds < best.seconds:
            best = Serving(moved=moved, share=share, seconds=seconds)
    return best


def _ends(work: LayerWork) -> tuple[np.ndarray, np.ndarray]:
    """When device and host end with x experts moved, float64 [n + 1] each."""
    return device_path_s(work, np.arange(len(work.host_s) + 1)), _remaining(work.host_s)


def _best_whole(paths: np.ndarray, remaining: np.ndarray) -> Serving:
    seconds = np.maximum(paths, remaining)
    moved = int(np.argmin(seconds))
    return Serving(moved=moved, share=0.0, seconds=float(seconds[moved]))


def bound_s(work: LayerWork) -> float:
    """Least time for divisible work, whatever the order: device, or link and host together."""
    remaining = _remaining(work.host_s)
    n = np.arange(len(remaining))
    link = n * work.fetch_s
    crossing = int(np.argmax(link >= remaining))
    if crossing == 0:
        return max(work.device_s, 0.0)
    host = work.host_s[crossing - 1]
    share = (remaining[crossing - 1] - link[crossing - 1]) / (work.fetch_s + host)
    return max(work.device_s, float(link[crossing - 1] + share * work.fetch_s))


def plan_two_layers(
    now: LayerWork, upcoming: LayerWork, *, attention_s: float, lanes: int | None = None
) -> TwoLayers:
    """The best (x, y) in one sweep; `upcoming` holds the next layer's predicted misses.

    `attention_s` is the window between the layers, `lanes` the landing buffers for prefetches.
    Ties go to fewer transfers.
    """
    n, m = len(now.host_s), len(upcoming.host_s)
    lanes = m if lanes is None else min(m, lanes)
    moved = np.arange(n + 1)
    now_s = np.maximum(device_path_s(now, moved), _remaining(now.host_s))
    link_s = np.where(moved > 0, now.link_delay_s + moved * now.fetch_s, now.link_delay_s)
    slack = now_s + attention_s - link_s
    fits = np.clip(np.floor(slack / upcoming.fetch_s + 1e-9), 0, lanes).astype(int)
    next_s = _next_layer(upcoming)
    total = now_s + attention_s + next_s[fits]
    x = int(np.argmin(total))
    y = int(np.argmax(next_s[: fits[x] + 1] <= next_s[fits[x]]))  # the first that is as good
    return TwoLayers(moved=x, prefetched=y, now_s=float(now_s[x]), next_s=float(next_s[y]))


def _next_layer(work: LayerWork) -> np.ndarray:
    """Best seconds of a layer when its first y misses are there already, float64 [n + 1] over y.

    What was prefetched costs the device `expert_s`. The crossing of link and host moves only one
    way as y grows, so two pointers suffice.
    """
    n = len(work.host_s)
    remaining = _remaining(work.host_s).tolist()

    def path(y: int, end: int) -> float:
        moved = end - y
        busy = work.device_s + end * work.expert_s
        if moved == 0:
            return busy
        link = work.link_delay_s + moved * work.fetch_s + work.expert_s
        return max(link, work.link_delay_s + work.fetch_s + moved * work.expert_s, busy)

    seconds = np.empty(n + 1)
    end = 0
    for y in range(n + 1):
        end = max(end, y)
        while end < n and path(y, end) < remaining[end]:
            end += 1
        before = max(end - 1, y)
        seconds[y] = min(max(path(y, at), remaining[at]) for at in (before, end))
    return seconds


def _remaining(host_s: np.ndarray) -> np.ndarray:
    """Host seconds of all but the first x experts, float64 [n + 1]."""
    remaining = np.zeros(len(host_s) + 1)
    remaining[-2::-1] = np.cumsum(host_s[::-1])
    return remaining
