"""Lower bounds on a decode step whose experts live in host memory.

Three things can limit such a step: the device (weights and KV cache read from its memory, or
arithmetic), the link that missing experts cross, and the host when it computes some of them in
place. A bound is the time of the busiest; no schedule beats it. The split between link and host
follows Fiddler (arXiv 2402.07033) and KTransformers, the do-no-harm rule is ours.

Units are in the names: `_s` seconds, `_bytes`, `_per_s`. Quantities are per layer unless said
otherwise; numpy arrays broadcast.

Symbols of the formulas:
    L  layers    E  experts    k  top_k    B  tokens of the step    N  distinct experts wanted
    h  hit rate  M  misses, (1 - h) N      tau  seconds to move one expert over the link
"""

import math
from typing import Any

import numpy as np

from moejax.core.errors import check

Number = Any  # float or numpy array


def distinct_experts(tokens: int, num_experts: int, top_k: int) -> float:
    """N(B) = E (1 - (1 - k/E)^B): distinct experts of a layer when tokens choose independently.

    Measured on DeepSeek-V2-Lite (64 experts, top-6, tokens of different prompts) 11.3, 20.6, 33.9
    and 49.0 at 2, 4, 8, 16 tokens; the formula is within 4 %, and above. Consecutive tokens of one
    sequence share more.

    >>> round(distinct_experts(8, 64, 6), 1)
    34.9
    """
    check(tokens >= 0, f"tokens={tokens} must not be negative")
    check(1 <= top_k <= num_experts, f"top_k={top_k}, expected 1 to num_experts={num_experts}")
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def missing_experts(distinct: Number, hit_rate: Number) -> Number:
    """M = (1 - h) N: experts that a layer wants and the device does not hold."""
    return (1 - hit_rate) * distinct


def device_floor_s(
    *,
    read_bytes: Number,
    flops: Number,
    memory_bytes_per_s: float,
    flops_per_s: float,
    num_layers: int = 1,
) -> float:
    """sum over layers of max(bytes / W_hbm, flops / F_dev): the step with everything resident.

    Args:
        read_bytes: what a layer reads from device memory: attention, wanted experts, KV cache. A
            number with `num_layers`, or an array over layers.
        flops: arithmetic of a layer, alike.
    """
    per_layer = np.maximum(
        np.asarray(read_bytes) / memory_bytes_per_s, np.asarray(flops) / flops_per_s
    )
    return float(np.sum(per_layer)) * num_layers


def transfer_s(expert_bytes: Number, link_bytes_per_s: float) -> Number:
    """tau: seconds to move one expert, in its wire format, over the link."""
    return expert_bytes / link_bytes_per_s


def link_s(num_layers: int, misses: Number, tau_s: Number) -> Number:
    """L M tau: seconds that the link is busy in a step."""
    return num_layers * misses * tau_s


def overlapped_bound_s(device_s: float, link_busy_s: float) -> float:
    """max(T_dev, L M tau): a step that moves every miss, perfectly overlapped."""
    return max(device_s, link_busy_s)


def serial_s(device_s: float, link_busy_s: float) -> float:
    """T_dev + L M tau: the same step with no overlap at all."""
    return device_s + link_busy_s


def overlap_speedup(device_s: float, link_busy_s: float) -> float:
    """The most that perfect prefetching gains over no overlap: never more than 2."""
    busiest = max(device_s, link_busy_s)
    return 1 + min(device_s, link_busy_s) / busiest if busiest else 1.0


def host_expert_s(
    host_bytes: float,
    params: float,
    rows: Number,
    *,
    host_bytes_per_s: float,
    host_flops_per_s: float,
) -> Number:
    """t_c = max(b_c / W_cpu, 2 P n / F_cpu): seconds for the host to run one expert on n rows."""
    return np.maximum(host_bytes / host_bytes_per_s, 2 * params * rows / host_flops_per_s)


def loaded_share(tau_s: float, host_s: float) -> float:
    """x* / M = t_c / (tau + t_c): the share of misses to move, so that link and host end together.

    The rest is computed on the host. 0 when the host is infinitely fast, 1 when it is idle.
    """
    if math.isinf(host_s):
        return 1.0
    return host_s / (tau_s + host_s)


def shared_bound_s(
    device_s: float,
    link_busy_s: float,
    *,
    tau_s: float,
    host_s: float,
    dram_bytes: float = 0.0,
    dram_bytes_per_s: float = math.inf,
) -> float:
    """max(T_dev, L M tau t_c / (tau + t_c), DRAM): misses split between link and host.

    Args:
        link_busy_s: L M tau, as if every miss crossed the link.
        dram_bytes: what both together read from host memory in the step. Transfers and the host's
            own reads share it: x b_w + (M - x) b_c <= W_dram T.
    """
    split_s = link_busy_s * loaded_share(tau_s, host_s)
    return max(device_s, split_s, dram_bytes / dram_bytes_per_s)


def wasted_loads(lanes: float, recall: float, top_k: int, hit_rate: float) -> float:
    """q = (m - R k)(1 - h'): loads of a layer that its tokens turn out not to want.

    Args:
        lanes: m, experts predicted. recall: R, of the k wanted that are among them.
        hit_rate: h', predicted experts that are cached already and therefore not loaded.
    """
    return max(0.0, lanes - recall * top_k) * (1 - hit_rate)


def prefetch_saving_s(
    num_layers: int, recall: float, misses: float, tau_s: float, window_s: float
) -> float:
    """L min(w, R M tau): time that right predictions hide; w is a layer's compute window."""
    return num_layers * min(window_s, recall * misses * tau_s)


def prefetch_cost_s(num_layers: int, wasted: float, tau_s: float) -> float:
    """L q tau: link time that wrong predictions take from misses that wait."""
    return num_layers * wasted * tau_s


def prefetch_helps(wasted: float, tau_s: float, window_s: float) -> bool:
    """The do-no-harm rule on a link-bound step: prefetch only while q < w / tau."""
    return wasted < window_s / tau_s


def least_recall(
    lanes: float, top_k: int, hit_rate: float, *, tau_s: float, window_s: float
) -> float:
    """The recall above which `prefetch_helps`; above 1 when no predictor is good enough.

    >>> round(least_recall(6, 6, 0.46, tau_s=0.69e-3, window_s=0.18e-3), 2)
    0.92
    """
    return max(0.0, (lanes - window_s / tau_s / (1 - hit_rate)) / top_k)


def speculative_bytes_per_token(
    num_layers: int, hit_rate: float, distinct: float, expert_bytes: float, accepted: float
) -> float:
    """L (1 - h) N b_w / accepted: link bytes per accepted token of a speculative step.

    `distinct` is of the consecutive tokens that are verified together.
    """
    return num_layers * (1 - hit_rate) * distinct * expert_bytes / accepted


def speculation_break_even(distinct: float, top_k: int) -> float:
    """N / k: a link-bound speculative step wins when it accepts more tokens than this."""
    return distinct / top_k


def lru_can_hit(num_slots: int, num_layers: int, top_k: int) -> bool:
    """Whether a shared least-recently-used pool can hit at all, at one token per step.

    With fewer slots than one token wants over all layers, L k, each slot is evicted before its
    layer comes round again. Layer quotas do not have this edge.
    """
    return num_slots >= num_layers * top_k


def achieved_fraction(bound_s: float, measured_s: float) -> float:
    """Bound over measured time: 1 is the physical limit, and above 1 the bound is wrong."""
    return bound_s / measured_s
