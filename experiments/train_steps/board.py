"""Metrics of a run as tensorboard event files.

    tensorboard --logdir=workdir/byte_moe/tensorboard

`train/*` every few steps, `heldout/*` and `load/*` at every evaluation: the load of each layer as a
histogram over expert ids, and of all layers as an image, a row per layer and a column per expert,
white from twice the mean on. `bytes/*` are those that one step sends over a mesh axis.
`dispatch/choice` says which levels and chunks a calibration chose, and what it predicts for others.

Axis letters:
    L  MoE layers    E  experts
"""

import math
import pathlib
from typing import Any

import numpy as np


def open_board(folder: pathlib.Path, first_step: int) -> Any:
    """A writer; what an earlier process wrote from `first_step` on is marked as overwritten."""
    # Imports torch where it is installed: seconds that only the process that writes should spend.
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)


def write_metrics(board: Any, step: int, metrics: dict[str, float]) -> None:
    """Scalars `name` to value."""
    for name, value in metrics.items():
        board.add_scalar(name, value, step)


def write_text(board: Any, step: int, name: str, text: str) -> None:
    """Lines of `text` under `name`."""
    board.add_text(name, text.replace("\n", "  \n"), step)  # two spaces: a line break


def write_load(board: Any, step: int, load: np.ndarray) -> None:
    """Assignments int64 [L, E]."""
    for layer, counts in enumerate(load):
        ids = np.arange(len(counts))
        board.add_histogram_raw(
            f"load/layer_{layer}",
            min=0,
            max=len(counts) - 1,
            num=int(counts.sum()),
            sum=float(counts @ ids),
            sum_squares=float(counts @ ids**2),
            bucket_limits=(ids + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
    board.add_image("load/all_layers", load_image(load), step, dataformats="HW")


def load_image(load: np.ndarray) -> np.ndarray:
    """uint8 [L, E]: 0 for no assignments, 255 from twice the layer's mean on."""
    mean = np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    return (np.minimum(load / mean / 2, 1) * 255).astype(np.uint8)


def bits(nats: float) -> float:
    """Bits of so many nats."""
    return nats / math.log(2)
