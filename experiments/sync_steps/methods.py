"""The methods that are compared, as sync configs; and what is asked of each."""

import dataclasses

from moejax.sync.config import SyncConfig

PERIOD = 8  # H of the local methods
EXACT_EVERY = 16  # k of CD-SGD


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to keep workers together.

    Attributes:
        fewer: times fewer bytes than synchronous that the comparison asks of it; None where it
            asks nothing.
        learning_rate: over that of the synchronous run. A worker's gradients have the noise of its
            own batch, and Adam divides by it: local methods stand larger rates.
        control_of: the method that this one is without its feedback.
    """

    sync: SyncConfig
    fewer: float | None = None
    learning_rate: float = 1.0
    control_of: str | None = None


def _diloco(every: int = PERIOD, learning_rate: float = 0.8, momentum: float = 0.5) -> SyncConfig:
    return SyncConfig(
        method="diloco",
        every=every,
        outer_learning_rate=learning_rate,
        outer_momentum=momentum,
    )


# The mean of coded updates in every step: an outer optimizer that only adds.
_TOP_K = dataclasses.replace(_diloco(1, 1.0, 0.0), codec="top_k", kept=34, block=256)
_STREAMING = dataclasses.replace(_diloco(), method="streaming_diloco", keep_local=0.25)
_CD_SGD = SyncConfig(method="cd_sgd", threshold=1e-3, exact_every=EXACT_EVERY)


def _without(sync: SyncConfig) -> SyncConfig:
    return dataclasses.replace(sync, feedback=False)


METHODS = {
    "synchronous": Method(SyncConfig(method="gradients")),
    "int8": Method(SyncConfig(method="gradients", codec="int8"), fewer=3.5),
    "top-k": Method(_TOP_K, fewer=10.0, learning_rate=1.5),
    "top-k, no feedback": Method(_without(_TOP_K), learning_rate=1.5, control_of="top-k"),
    "local SGD": Method(SyncConfig(method="local_sgd", every=PERIOD), learning_rate=1.5),
    "DreamDDP": Method(SyncConfig(method="dream_ddp", every=PERIOD), fewer=8.0, learning_rate=1.5),
    "DiLoCo": Method(_diloco(), fewer=8.0),
    "Streaming DiLoCo": Method(_STREAMING, fewer=8.0),
    "CD-SGD": Method(_CD_SGD, fewer=8.0, learning_rate=1.5),
    "CD-SGD, no feedback": Method(_without(_CD_SGD), learning_rate=1.5, control_of="CD-SGD"),
}
