"""Ways to serve a model from host memory that the benchmark compares, by name."""

import dataclasses
import json
import pathlib
from typing import Any, Literal, get_args

from moejax.core.errors import InputError, check
from moejax.costmodel.miss import MissCosts
from moejax.kernels.quantized import Format
from moejax.offload.misses import Serve
from moejax.offload.stage import OffloadConfig

Keep = Literal["none", "lru", "lfu", "average", "static"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What happens to misses and to the cache; an `OffloadConfig` without the machine.

    Attributes:
        keep: `static` fills the cache with the most used experts once; `none` has no cache, but
            slots for the experts of one layer; else what is evicted.
        lanes: experts that the link fetches ahead, those that the next layer's own gate names.
        admission: while idle it fetches the most used ones instead, see `offload.admission`.
        importance_threshold: misses below it in importance are moved in `LOW_FORMAT`; lossy.
    """

    name: str
    serve: Serve = "fetch"
    keep: Keep = "lru"
    lanes: int = 0
    admission: bool = False
    column_parts: int = 1
    importance_threshold: float | None = None

    def __post_init__(self):
        for field, known in (("serve", get_args(Serve)), ("keep", get_args(Keep))):
            value = getattr(self, field)
            check(value in known, f"{field}={value!r} is not one of {', '.join(known)}")
        for field, least in (("lanes", 0), ("column_parts", 1)):
            value = getattr(self, field)
            check(value >= least, f"{field}={value} must be at least {least}")

    @property
    def is_exact(self) -> bool:
        """Whether outputs are those of resident experts to the bit, on CPU."""
        return self.column_parts == 1 and not self.is_lossy

    @property
    def is_lossy(self) -> bool:
        """Whether outputs are those of other weights than the model's."""
        return self.importance_threshold is not None

    def config(
        self, slots: int, num_layers: int, num_experts: int, costs: MissCosts
    ) -> OffloadConfig:
        """The stage's config with `slots` whole experts on the device, landing ones included.

        `costs` are those of a whole expert.
        """
        parts = self.column_parts
        kept = max(num_layers, slots * parts - self.lanes)
        # Least recently used of all layers: used again a whole step later, so never found again.
        layer_alone = min(slots, num_experts) * parts
        return OffloadConfig(
            num_slots=layer_alone if self.keep == "none" else kept,
            quota="shared" if self.keep == "none" else "layer",
            policy="lru" if self.keep in ("none", "static") else self.keep,
            prefetch_lanes=self.lanes,
            admission=self.admission,
            serve=self.serve,
            costs=part_costs(costs, parts) if self.serve == "divide" else None,
            column_parts=parts,
            importance_threshold=self.importance_threshold,
        )


def part_costs(costs: MissCosts, parts: int) -> MissCosts:
    """Costs of one of `parts` column parts of an expert."""
    return MissCosts(**{k: seconds / parts for k, seconds in dataclasses.asdict(costs).items()})


POLICIES: dict[str, Policy] = {
    one.name: one
    for one in (
        Policy(name="on_demand", keep="none"),
        Policy(name="lru"),
        Policy(name="lfu", keep="lfu"),
        Policy(name="average", keep="average"),
        Policy(name="average+admission", keep="average", lanes=2, admission=True),
        Policy(name="next_gate", lanes=4),
        Policy(name="all_host", serve="host", keep="none"),
        Policy(name="static_hot", serve="host", keep="static"),
        Policy(name="host+admission", serve="host", keep="average", lanes=2, admission=True),
        Policy(name="divide", serve="divide", keep="lfu"),
        Policy(name="divide+next_gate", serve="divide", keep="lfu", lanes=4),
        Policy(name="columns", serve="divide", keep="lfu", column_parts=4),
        Policy(name="hobbit", importance_threshold=0.6),
    )
}
# Of the misses that a lossy policy moves in few bits.
LOW_FORMAT: Format = "int4"


def get_policies(names: list[str]) -> list[Policy]:
    """The policies called so, in that order; `InputError` that lists the known ones."""
    unknown = [name for name in names if name not in POLICIES]
    known = ", ".join(POLICIES)
    check(not unknown, f"policy {', '.join(map(repr, unknown))} is not one of {known}")
    check(bool(names), f"--policy= names none of {known}")
    return [POLICIES[name] for name in dict.fromkeys(names)]


def plan_json(policy: Policy, costs: MissCosts, about: dict[str, Any]) -> str:
    """A policy that was chosen for a machine, as `read_plan` reads it."""
    fields = {"policy": dataclasses.asdict(policy), "costs": dataclasses.asdict(costs)}
    return json.dumps({"format": "moejax.offload_plan", "version": 1, **fields, "about": about})


def read_plan(path: str) -> tuple[Policy, MissCosts]:
    """What `plan_json` wrote; `InputError` with the file and the reason for anything else."""
    try:
        plan = json.loads(pathlib.Path(path).read_text())
        ours = isinstance(plan, dict) and plan.get("format") == "moejax.offload_plan"
        if not ours:
            raise InputError("not a plan that --autotune saved")
        return Policy(**plan["policy"]), MissCosts(**plan["costs"])
    except OSError as error:
        raise InputError(f"--plan={path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise InputError(f"--plan={path}: {error}") from error
