"""What a checkpoint of a run carries besides arrays: its configs and the metrics of every step."""

import dataclasses
from typing import Any

import numpy as np

from moejax.checkpoint.config_json import difference, from_json, to_json
from moejax.core.errors import check
from moejax.models.config import DecoderConfig
from moejax.sync.config import SyncConfig
from moejax.training.config import TrainConfig
from moejax.training.offloading import OffloadingConfig
from moejax.training.state import StepMetrics

COLUMNS = (*(field.name for field in dataclasses.fields(StepMetrics)), "elapsed_secs")
_NO_SYNC = SyncConfig()
# May change when a run continues: how often it saves, and where its arrays lie.
FREE = ("checkpoint_secs", "checkpoint_steps", "dispatch", "fully_sharded", "experts_memory")


@dataclasses.dataclass(kw_only=True)
class RunLog:
    """Grows as the run goes on.

    Attributes:
        crc32: of the training data.
        elapsed_secs: seconds of training when it was saved last.
        columns: one list per name of `COLUMNS`, an entry per step.
    """

    crc32: int
    elapsed_secs: float = 0.0
    columns: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {name: [] for name in COLUMNS}
    )

    @property
    def num_steps(self) -> int:
        return len(self.columns["loss"])

    def append(self, metrics: StepMetrics, elapsed_secs: float) -> None:
        """Adds the metrics of a step, which have arrived."""
        for name, value in metrics.__dict__.items():
            self.columns[name].append(float(value))
        self.columns["elapsed_secs"].append(elapsed_secs)

    def last(self) -> dict[str, float]:
        """The metrics of the newest step."""
        return {name: values[-1] for name, values in self.columns.items()}

    def tokens_per_s(self, cfg: TrainConfig, over: int = 20) -> float:
        """Of the last `over` steps; 0 before there are two."""
        times = self.columns["elapsed_secs"][-over - 1 :]
        tokens = (len(times) - 1) * cfg.batch_size * cfg.seq_len
        return tokens / (times[-1] - times[0]) if tokens > 0 else 0.0

    def history(self) -> dict[str, np.ndarray]:
        """float64 [steps] per column."""
        return {name: np.array(values) for name, values in self.columns.items()}


def to_extra(
    log: RunLog, model: DecoderConfig, cfg: TrainConfig, sync: SyncConfig = _NO_SYNC
) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    configs = {"model": model, "train": cfg, "sync": sync}
    return {**{k: to_json(v) for k, v in configs.items()}, "log": dataclasses.asdict(log)}


def from_extra(
    extra: dict[str, Any],
    where: str,
    crc32: int,
    model: DecoderConfig,
    cfg: TrainConfig,
    sync: SyncConfig = _NO_SYNC,
) -> RunLog:
    """The log of a checkpoint; raises `InputError` unless it is of this model, run and corpus."""
    # Checkpoints that know no sync plans were made without one.
    extra = {"sync": to_json(_NO_SYNC), **extra}
    for name in ("model", "train", "log"):
        check(name in extra, f"{where} is not a training run's: its extra has no {name!r}")
    stored_cfg = from_json(TrainConfig, _with_offloading(extra["train"]), f"{where}: train")
    free = {name: getattr(cfg, name) for name in FREE}
    for name, stored, wanted in (
        ("model", from_json(DecoderConfig, extra["model"], f"{where}: model"), model),
        ("train", dataclasses.replace(stored_cfg, **free), cfg),
        ("sync", from_json(SyncConfig, extra["sync"], f"{where}: sync"), sync),
    ):
        check(
            stored == wanted,
            f"{where} is of another run, {name}: {difference(stored, wanted)}; "
            "continue with its config or choose another folder",
        )
    log = _parse_log(extra["log"], where)
    check(log.crc32 == crc32, f"{where} was trained on other data (crc32 {log.crc32}, not {crc32})")
    return log


def _with_offloading(train: Any) -> Any:
    """Checkpoints that know no terms for offloading were trained without them."""
    if not isinstance(train, dict):
        return train
    return {"offloading": to_json(OffloadingConfig()), **train}


def _parse_log(value: Any, where: str) -> RunLog:
    fields = {field.name for field in dataclasses.fields(RunLog)}
    good = isinstance(value, dict) and value.keys() == fields and isinstance(value["columns"], dict)
    good = good and value["columns"].keys() == set(COLUMNS)
    good = good and all(isinstance(column, list) for column in value["columns"].values())
    good = good and len({len(column) for column in value["columns"].values()}) == 1
    check(good, f"{where}: its log does not hold {sorted(fields)} with a list for each metric")
    return RunLog(**value)
