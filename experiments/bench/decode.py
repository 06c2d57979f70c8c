"""Decoding a resident model: tokens per second against transformers and the memory's bandwidth.

    python -m experiments.bench.decode --shape=olmoe-400m --json=results/decode.json

A random checkpoint of the shape is written by transformers and read by our loader, so both decode
the same weights; their greedy tokens are compared. Prompt of 128 random tokens, 64 new ones. The
two run in processes of their own that alternate; headline figures are ratios of minima (the JSON
holds medians too). The bound of a step is one read of the dense weights and of the experts that
were used, at the streaming rate measured in the same run. Quiet machine, please.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.shapes import get_shape
from experiments import cli
from experiments.bench import decode_torch
from experiments.bench.decode_torch import Work
from experiments.bench.moe_layer_torch import missing_packages
from experiments.bench.shape_flags import BATCH, SHAPE
from experiments.measure import stream_read_bytes_per_s
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.interop.hf.load import load_folder
from moejax.models.footprint import step_read_bytes
from moejax.serving.engine import Engine, make_engine

PROMPT = flags.DEFINE_integer("prompt", 128, "tokens of every prompt", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "tokens to decode", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs per process", lower_bound=2)
PROCESSES = flags.DEFINE_integer("processes", 2, "alternating processes per side", lower_bound=1)
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "of the weights")
SIDE = flags.DEFINE_enum(
    "side", None, ["write", "moejax", "transformers"], "one side only, prints JSON (internal)"
)
FOLDER = flags.DEFINE_string("folder", "", "of the checkpoint (internal)")
MUST = {"decode": 1.5, "prefill": 1.0}


def works() -> list[Work]:
    """What is timed, by batch size."""
    sizes = cli.read_counts(BATCH)
    rest = {
        "prompt": PROMPT.value,
        "new_tokens": NEW_TOKENS.value,
        "repeats": REPEATS.value,
        "vocab_size": get_shape(SHAPE.value).vocab_size,
    }
    return [Work(batch=size, **rest) for size in sizes]


def time_ours(folder: str, work: Work, dtype: str) -> dict[str, Any]:
    """Seconds of prefills and decodes, the tokens, and bytes that a step must read."""
    mesh = make_mesh()
    model = load_folder(folder, mesh=mesh, dtype=dtype, expert_memory="device")
    capacity = work.prompt + work.new_tokens
    engine = make_engine(model.params, model.experts, model.cfg, mesh, capacity=capacity)
    prompt = jnp.asarray(work.tokens())
    runs = [generate(engine, prompt, work.new_tokens) for _ in range(work.repeats + 1)][1:]
    return {
        "prefill": [run[0] for run in runs],
        "decode": [run[1] for run in runs],
        "tokens": runs[0][2],
        "step_bytes": step_read_bytes(model.params, model.experts, runs[0][3]),
    }


def generate(
    engine: Engine, prompt: jax.Array, new_tokens: int
) -> tuple[float, float, list[list[int]], float]:
    """Seconds of the prefill and of the steps behind it, new tokens [B][N], experts per step."""
    session = jax.block_until_ready(engine.start(len(prompt)))
    mask = jnp.ones(prompt.shape, bool)
    begin = time.perf_counter()
    session, token, _ = jax.block_until_ready(engine.prefill(session, prompt, mask))
    prefill, tokens, lookups = time.perf_counter() - begin, [token], []
    begin = time.perf_counter()
    for _ in range(new_tokens - 1):
        session, token, metrics = engine.step(session)
        tokens.append(token)
        lookups.append(metrics.lookups)
    jax.block_until_ready(token)
    decode = time.perf_counter() - begin
    used = float(np.mean([np.asarray(one).sum() for one in lookups]))
    return prefill, decode, np.stack(tokens, 1).tolist(), used


def run_worker() -> dict[str, Any]:
    """One side's seconds by dtype and batch size."""
    if SIDE.value == "write":
        decode_torch.write_checkpoint(FOLDER.value, get_shape(SHAPE.value))
        return {}
    result: dict[str, Any] = {}
    for dtype in DTYPES.value:
        for work in works():
            if SIDE.value == "moejax":
                times = {"moejax": time_ours(FOLDER.value, work, dtype)}
            else:
                times = decode_torch.time_transformers(
                    FOLDER.value, work, dtype, threads=cli.cpu_cores()
                )
            result.setdefault(dtype, {})[str(work.batch)] = times
    return result


def start_worker(side: str, folder: str) -> dict[str, Any]:
    """Runs one side in a process of its own."""
    passed = [one for one in sys.argv[1:] if not one.startswith("--json")]
    command = [sys.executable, "-m", "experiments.bench.decode", *passed]
    command += [f"--side={side}", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {side} process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """By dtype, batch size and implementation: all seconds, tokens, bytes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start_worker("write", folder)
        sides = ["transformers", "moejax"] * PROCESSES.value
        for side in track(sides, description="processes", transient=True):
            for dtype, by_batch in start_worker(side, folder).items():
                for batch, arms in by_batch.items():
                    merged = found.setdefault(dtype, {}).setdefault(batch, {})
                    for name, arm in arms.items():
                        one = merged.setdefault(name, arm | {"prefill": [], "decode": []})
                        one["prefill"] += arm["prefill"]
                        one["decode"] += arm["decode"]
    return found


def compare(arms: dict[str, dict[str, Any]], read_bytes_per_s: float) -> dict[str, Any]:
    """Speed-ups over the fastest of the others, and the fraction of the bound."""
    ours = arms["moejax"]
    others = {name: arm for name, arm in arms.items() if name != "moejax"}
    steps = NEW_TOKENS.value - 1
    bound = ours["step_bytes"] / read_bytes_per_s
    result: dict[str, Any] = {
        "step_ms": 1e3 * min(ours["decode"]) / steps,
        "bound_ms": 1e3 * bound,
        "fraction_of_bandwidth": bound * steps / min(ours["decode"]),
        "tokens_identical": all(arm["tokens"] == ours["tokens"] for arm in others.values()),
    }
    for phase in ("decode", "prefill"):
        best = min(others, key=lambda name: min(others[name][phase]))
        medians = [statistics.median(arm[phase]) for arm in (others[best], ours)]
        result[phase] = {
            "of_minima": min(others[best][phase]) / min(ours[phase]),
            "of_medians": medians[0] / medians[1],
            "best_implementation": best,
            "seconds": {name: arm[phase] for name, arm in arms.items()},
        }
    return result


def make_figures(compared: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Headline figures in float32; other dtypes under their names."""
    figures: dict[str, Any] = {"bars": MUST, "details": compared}
    for dtype, by_batch in compared.items():
        heads: dict[str, Any] = {
            f"{phase}_speedup_vs_transformers": {
                batch: one[phase]["of_minima"] for batch, one in by_batch.items()
            }
            for phase in MUST
        }
        for name in ("fraction_of_bandwidth", "tokens_identical"):
            heads[name] = {batch: one[name] for batch, one in by_batch.items()}
        figures |= heads if dtype == "float32" else {dtype: heads}
    return figures


def print_table(compared: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table(
        "dtype", "batch", "step ms", "of read bound", "decode x", "by medians", "prefill x",
        "best other", "same tokens",
    )  # fmt: skip
    for dtype, by_batch in compared.items():
        for batch, one in by_batch.items():
            decode, prefill = one["decode"], one["prefill"]
            table.add_row(
                dtype,
                batch,
                f"{one['step_ms']:.2f}",
                f"{one['fraction_of_bandwidth']:.2f}",
                f"{decode['of_minima']:.2f}",
                f"{decode['of_medians']:.2f}",
                f"{prefill['of_minima']:.2f}",
                decode["best_implementation"],
                "yes" if one["tokens_identical"] else "no",
            )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    if SIDE.value:
        print(json.dumps(run_worker()))
        return
    cli.check_writable(cli.JSON.value)
    works()
    missing = missing_packages()
    check(not missing, f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    found = measure()
    rate = stream_read_bytes_per_s()
    compared = {
        dtype: {batch: compare(arms, rate) for batch, arms in by_batch.items()}
        for dtype, by_batch in found.items()
    }
    print_table(compared)
    cli.write_report("bench/decode", "time", make_figures(compared))


if __name__ == "__main__":
    cli.run(main)
