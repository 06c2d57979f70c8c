"""A run of `experiments/train.py` that takes seconds, and several processes of it."""

import os
import pathlib
import socket
import subprocess
import sys

from configs.byte_moe import get_config
from configs.run import RunConfig
from moejax.core.overlay import overlay

ROOT = pathlib.Path(__file__).parents[3]
TINY = (
    "model.num_layers=1 model.d_model=8 model.d_ff=8 model.router.num_experts=4 model.num_heads=1 "
    "model.num_kv_heads=1 model.head_dim=8 train.batch_size=8 train.seq_len=4 "
    "train.horizon_steps=4 train.checkpoint_steps=2 mesh.data=2 mesh.expert=4 "
    "log_steps=1 eval_steps=2 eval_batches=1"
).split()
CHILD = "tests.experiments.train_steps.process_child"


def tiny_run(text: pathlib.Path, *more: str) -> RunConfig:
    return overlay(get_config(), [*TINY, f"data.path={text}", *more])


def write_text(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 8)
    return folder


def start(count: int, module: str, args: list[str]) -> list[subprocess.Popen]:
    """`count` processes of a program that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
    command = [sys.executable, "-m", module, *args]
    command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]
