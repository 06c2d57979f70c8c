"""What one missing expert costs: moved to the device, computed on the host, or split between both.

A split cuts the hidden columns of an expert: a share alpha lies on the device, beta is moved there,
gamma is computed on the host, alpha + beta + gamma = 1 (model partitioning of ScheInfer, arXiv
2411.15715; this solver is ours). The parts run at once and each takes time in proportion to its
share, so the best split is where the host and the busier of link and device end together. With few
rows (decode) the device is free and beta : gamma = W_link : W_host; with many (prefill) the host is
bound by arithmetic and gamma goes to 0.
"""

import dataclasses

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.hardware import Machine
from moejax.costmodel.offload_bounds import Number, host_expert_s, transfer_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissCosts:
    """Seconds of one expert, measured or planned: what the compiled step divides misses by."""

    fetch_s: float  # tau, on the link
    host_read_s: float  # the host reads its weights
    host_row_s: float  # the host computes one row

    def __post_init__(self):
        for name, seconds in dataclasses.asdict(self).items():
            check(seconds > 0, f"{name}={seconds} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCost:
    """One expert of a layer on one machine."""

    machine: Machine
    expert_bytes: float  # as stored, read by the host and by the device
    wire_bytes: float  # as it crosses the link
    params: float

    @property
    def fetch_s(self) -> float:
        """tau: seconds on the link."""
        return float(transfer_s(self.wire_bytes, self.machine.link_rate))

    def host_s(self, rows: Number) -> Number:
        """t_c(n): seconds of the host for `rows` rows."""
        machine = self.machine
        return host_expert_s(
            self.expert_bytes,
            self.params,
            rows,
            host_bytes_per_s=machine.host_rate,
            host_flops_per_s=machine.host_flops_per_s,
        )

    @property
    def miss(self) -> MissCosts:
        """The same as constants."""
        return MissCosts(
            fetch_s=self.fetch_s,
            host_read_s=self.expert_bytes / self.machine.host_rate,
            host_row_s=2 * self.params / self.machine.host_flops_per_s,
        )

    def device_s(self, rows: Number) -> Number:
        """Seconds of the device for `rows` rows, with the expert in its memory."""
        chip = self.machine.chip
        return np.maximum(
            self.expert_bytes / chip.hbm_bytes_per_s, 2 * self.params * rows / chip.bf16_flops
        )


def expert_cost(
    machine: Machine, expert_bytes: float, *, bits_per_weight: float = 16.0, wire: float = 1.0
) -> ExpertCost:
    """The cost of an expert of `expert_bytes`; `wire` is what crosses the link over what is stored.

    A `wire` below 1 is a narrower format and lossy.
    """
    check(expert_bytes > 0, f"expert_bytes={expert_bytes} must be positive")
    check(bits_per_weight > 0, f"bits_per_weight={bits_per_weight} must be positive")
    check(0 < wire <= 1, f"wire={wire} must be above 0 and at most 1")
    return ExpertCost(
        machine=machine,
        expert_bytes=expert_bytes,
        wire_bytes=wire * expert_bytes,
        params=8 * expert_bytes / bits_per_weight,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Shares of an expert's columns and when the last of them is done."""

    alpha: float  # computed from device memory
    beta: float  # moved, then computed on the device
    gamma: float  # computed on the host
    seconds: float


def split_columns(cost: ExpertCost, rows: float, *, resident: float = 0.0) -> Split:
    """The fastest split of one expert on `rows` rows, in closed form.

    Args:
        resident: the share of its columns that device memory holds, an upper limit of alpha.

    Minimises max(beta tau, (alpha + beta) t_dev, gamma t_host).

    >>> from moejax.costmodel.hardware import get_machine
    >>> cost = expert_cost(get_machine("A100-PCIe4"), 17e6)
    >>> decode, prefill = split_columns(cost, 1), split_columns(cost, 4096)
    >>> round(decode.gamma, 2), round(prefill.gamma, 2)
    (0.87, 0.05)
    """
    check(0 <= resident <= 1, f"resident={resident} is not between 0 and 1")
    tau, host, device = cost.fetch_s, float(cost.host_s(rows)), float(cost.device_s(rows))
    with_link = (resident * tau + host) / (tau + host)  # (s - resident) tau = (1 - s) host
    with_device = host / (device + host)  # s device = (1 - s) host
    share = min(with_link, with_device)  # of the device: alpha + beta
    alpha = min(resident, share)
    beta = share - alpha
    return Split(
        alpha=alpha,
        beta=beta,
        gamma=1 - share,
        seconds=max(beta * tau, share * device, (1 - share) * host),
    )
