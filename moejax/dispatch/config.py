"""Which dispatch a run uses, as a frozen config."""

import dataclasses
import inspect
import math
from typing import Any, get_args

import jax

from moejax.core.errors import check
from moejax.costmodel.hierarchy import Level, candidate_levels
from moejax.dispatch.api import STRATEGIES, TOKEN_CHOICE, make_dispatch
from moejax.dispatch.slots import Capacity
from moejax.experts.stage import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How tokens reach experts on other ranks.

    Attributes:
        strategy: a name of `moejax.dispatch.api.STRATEGIES`.
        over_data: experts are split over the mesh axis `data` too, not only over `expert`.
        num_levels: of `hierarchical`; with 1 it sends over all axes at once.
        capacity_factor: of the strategies that have a capacity.
        num_chunks: of tokens; see `pipelined`.
        fall_back: repeat a layer by `gather` where any rank dropped anything.
        lowering: of the collectives, by name; None is the strategy's own choice. `dma` is for TPUs,
            `multicast` for GPUs of one switch.
    """

    strategy: str = "gather"
    over_data: bool = False
    num_levels: int | None = None  # as many as there are axes
    capacity_factor: float = 1.25
    num_chunks: int = 1
    fall_back: bool = False
    lowering: str | None = None

    def __post_init__(self):
        known = sorted(name for name in STRATEGIES if self._places(name))
        check(self.strategy in known, f"strategy={self.strategy!r} is not one of {known}")
        check(
            0 < self.capacity_factor < math.inf,
            f"capacity_factor={self.capacity_factor} must be positive and finite",
        )
        check(self.num_chunks >= 1, f"num_chunks={self.num_chunks} must be at least 1")
        check(
            self.num_levels is None or self.strategy == "hierarchical",
            f"num_levels={self.num_levels} is of hierarchical, not of {self.strategy!r}",
        )
        check(
            not self.fall_back or STRATEGIES[self.strategy].drops,
            f"strategy={self.strategy!r} drops nothing, it needs no fall_back",
        )
        lowerings = self._lowerings(self.strategy)
        check(
            self.lowering is None or self.lowering in lowerings,
            f"lowering={self.lowering!r} is not one of {lowerings} of {self.strategy!r}",
        )
        most = len(self.axes)
        check(
            self.num_levels is None or 1 <= self.num_levels <= most,
            f"num_levels={self.num_levels} is not in 1 to {most}, over {' and '.join(self.axes)}",
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that experts are split over."""
        return ("data", "expert") if self.over_data else ("expert",)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Of `hierarchical`, outermost first."""
        return candidate_levels(self.axes)[(self.num_levels or len(self.axes)) - 1]

    def stage(self, num_experts: int, gate: str, token_axes: tuple[str, ...]) -> Stage:
        """The stage for use inside `shard_map`; raises `InputError` for an invalid gate."""
        if self.lowering == "multicast":  # asking starts the backend: only where it matters
            backend = jax.default_backend()
            check(backend == "gpu", f"lowering='multicast' wants GPUs, this is {backend}")
        names = inspect.signature(STRATEGIES[self.strategy].build).parameters
        options: dict[str, Any] = {"token_axes": token_axes}
        if "levels" in names:
            options["levels"] = self.levels
        else:
            options["axis"] = self.axes
        if "capacity" in names:
            options["capacity"] = Capacity(factor=self.capacity_factor)
        if self.lowering is not None:
            options["lowering"] = self.lowering
        return make_dispatch(
            self.strategy,
            num_experts=num_experts,
            gate=gate,
            num_chunks=self.num_chunks,
            fall_back=self.fall_back,
            **options,
        )

    @staticmethod
    def _lowerings(name: str) -> tuple[str, ...]:
        """Of a strategy's collectives, where there is a choice."""
        parameter = inspect.signature(STRATEGIES[name].build).parameters.get("lowering")
        return () if parameter is None else get_args(parameter.annotation)

    @staticmethod
    def _places(name: str) -> bool:
        """Whether these fields say all that the strategy wants."""
        if not set(TOKEN_CHOICE) & set(STRATEGIES[name].gates):
            return False
        names = inspect.signature(STRATEGIES[name].build).parameters
        required = {key for key, one in names.items() if one.default is one.empty}
        return required <= {"num_experts", "levels"} and ("levels" in names or "axis" in names)
