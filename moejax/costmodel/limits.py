"""The limit report: what a step moved, the least time that could take, and what it took."""

import dataclasses
from typing import Any, Literal

from moejax.core.errors import check
from moejax.costmodel.offload_bounds import achieved_fraction, overlapped_bound_s

Limit = Literal["device", "link", "link and host"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitReport:
    """One kind of step against its physical bound. Times are of one step."""

    bytes_per_step: float
    device_s: float
    link_s: float  # with `host_s` in play, of the share that crosses the link
    bound_s: float
    limit: Limit
    measured_s: float | None
    achieved_fraction: float | None
    link_utilisation: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """One line for people."""
        text = (
            f"{self.bytes_per_step / 1e6:.2f} MB per step; bound {_ms(self.bound_s)} by the "
            f"{self.limit} (device {_ms(self.device_s)}, link {_ms(self.link_s)})"
        )
        if self.measured_s is None:
            return text
        return (
            f"{text}; measured {_ms(self.measured_s)}, {self.achieved_fraction:.0%} of the bound, "
            f"link busy {self.link_utilisation:.0%}"
        )


def limit_report(
    *,
    bytes_per_step: float,
    link_bytes_per_s: float,
    device_s: float,
    host_bytes_per_s: float = 0.0,
    measured_s: float | None = None,
) -> LimitReport:
    """Bounds a step that needs `bytes_per_step` of experts that the device does not hold.

    Args:
        bytes_per_step: counted by the step itself (misses and prefetches times expert bytes).
        link_bytes_per_s: host to device, best measured in the same run.
        device_s: the step with everything resident, measured in the same run or a device floor.
        host_bytes_per_s: rate at which the host computes experts in place; 0 when it does not.
            Link and host then share the bytes in proportion to their rates.
        measured_s: seconds of the real step, for the achieved fraction.

    Raises `InputError` for rates and times that cannot be.
    """
    check(link_bytes_per_s > 0, f"link_bytes_per_s={link_bytes_per_s} must be positive")
    check(host_bytes_per_s >= 0, f"host_bytes_per_s={host_bytes_per_s} must not be negative")
    check(bytes_per_step >= 0, f"bytes_per_step={bytes_per_step} must not be negative")
    check(device_s >= 0, f"device_s={device_s} must not be negative")
    check(measured_s is None or measured_s > 0, f"measured_s={measured_s} must be positive")
    moving_s = bytes_per_step / (link_bytes_per_s + host_bytes_per_s)
    bound_s = overlapped_bound_s(device_s, moving_s)
    limit: Limit = "device"
    if moving_s > device_s:
        limit = "link and host" if host_bytes_per_s else "link"
    return LimitReport(
        bytes_per_step=bytes_per_step,
        device_s=device_s,
        link_s=moving_s,
        bound_s=bound_s,
        limit=limit,
        measured_s=measured_s,
        achieved_fraction=None if measured_s is None else achieved_fraction(bound_s, measured_s),
        link_utilisation=None if measured_s is None else moving_s / measured_s,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
