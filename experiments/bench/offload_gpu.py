"""A model larger than the device's budget on a GPU: moejax against accelerate's CPU offload.

    python -m experiments.bench.offload_gpu --json=results/offload_gpu.json

Mixtral-8x7B's shape in bfloat16: 87 GiB of random weights, made from a seed, of which a device
budget of 24 GiB holds a quarter. The two sides run in processes of their own, one after the other,
because host memory has no room for two copies; `--only` runs one alone. Ours keeps the experts in
pinned host memory and fetches what is missing inside the compiled step; accelerate spreads layers
over both memories and moves a layer when it is called (`offload_gpu_torch`). The bound of a step is
the bytes that it moved at the rate of the link, measured in the same run.

Wants an NVIDIA GPU with room for the largest weight stack (28 GiB) while the model is made, 110 GiB
of host memory, jax[cuda] >= 0.11.1, and for the other side torch with CUDA, transformers and
accelerate. On a CPU everything runs, at a small `--shape`, and says that it measured no GPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from configs.shapes import get_shape
from experiments import cli
from experiments.bench import offload_gpu_torch
from experiments.bench.decode import NEW_TOKENS, PROMPT
from experiments.bench.decode_torch import Work
from experiments.bench.shape_flags import BATCH, BUDGET, SHAPE
from experiments.generate_steps import decode
from experiments.measure import host_fetch_bytes_per_s
from moejax.core.errors import check
from moejax.core.memory import device_sharding, host_sharding, nbytes
from moejax.core.mesh import make_mesh
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder
from moejax.models.experts import split_experts
from moejax.models.footprint import plan_offload
from moejax.offload.budget import parse_budget
from moejax.offload.store import EXPERT_SPEC
from moejax.serving import prediction
from moejax.serving.engine import make_engine

LANES = flags.DEFINE_integer("prefetch_lanes", 0, "next-gate prefetches per layer", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "of the weights", lower_bound=0)
SIDES = ("moejax", "accelerate")
ONLY = flags.DEFINE_enum("only", None, SIDES, "run one side only, in this process")
# Of pinned memory; the default of XLA is 64 GiB.
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def main() -> None:
    cli.check_writable(cli.JSON.value)
    in_bytes = isinstance(parse_budget(BUDGET.value), int)
    check(in_bytes, f"--device_budget={BUDGET.value} wants bytes such as 24GiB")
    cfg, jobs = dataclasses.replace(get_shape(SHAPE.value), dtype="bfloat16"), works()
    if ONLY.value == "moejax":
        figures = run_moejax(cfg, jobs)
    elif ONLY.value == "accelerate":
        figures = run_accelerate(cfg, jobs)
    else:
        figures = run_both()
        show(figures)
    gpu = figures.pop("gpu")
    if not gpu:
        figures["note"] = "measured on a CPU: these are not figures of a GPU"
        print(figures["note"], file=sys.stderr)
    device = figures.pop("device")
    cli.write_report("bench/offload_gpu", "time" if gpu else "numerics", figures, device=device)
    if ONLY.value:
        print(json.dumps(figures | {"gpu": gpu, "device": device}))


def works() -> list[Work]:
    """What is timed, by batch size."""
    rest = {"prompt": PROMPT.value, "new_tokens": NEW_TOKENS.value, "repeats": 1}
    vocab = get_shape(SHAPE.value).vocab_size
    return [Work(batch=size, vocab_size=vocab, **rest) for size in cli.read_counts(BATCH)]


def run_both() -> dict[str, Any]:
    """Each side in a process of its own, in turn; accelerate only where it is installed."""
    figures: dict[str, Any] = {}
    missing = offload_gpu_torch.missing_packages()
    for side in SIDES:
        if side == "accelerate" and missing:
            figures[side] = f"not run: pip install {' '.join(missing)}"
            print(f"{side} {figures[side]}", file=sys.stderr)
            continue
        passed = [one for one in sys.argv[1:] if not one.startswith("--json")]
        command = [sys.executable, "-m", "experiments.bench.offload_gpu", *passed, f"--only={side}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"the {side} process failed with status {done.returncode}")
        figures[side] = json.loads(done.stdout.splitlines()[-1])
        figures |= {name: figures[side].pop(name) for name in ("gpu", "device")}
        figures[side].pop("note", None)
    if not missing:
        figures["decode_speedup_vs_accelerate"] = {
            size: ours["tokens_per_s"] / figures["accelerate"]["batch"][size]["tokens_per_s"]
            for size, ours in figures["moejax"]["batch"].items()
        }
    return figures


def run_accelerate(cfg: DecoderConfig, jobs: list[Work]) -> dict[str, Any]:
    missing = offload_gpu_torch.missing_packages()
    check(not missing, f"--only=accelerate wants {', '.join(missing)}: pip install them")
    budget = parse_budget(BUDGET.value)
    assert isinstance(budget, int)
    return offload_gpu_torch.run(cfg, jobs, budget, SEED.value)


def run_moejax(cfg: DecoderConfig, jobs: list[Work]) -> dict[str, Any]:
    """Decodes every job under the budget; figures by batch size."""
    # Read when the backend starts, which is now.
    os.environ.setdefault(HOST_LIMIT, "112")
    mesh = make_mesh()
    device = jax.devices()[0]
    params, experts = random_model(cfg, mesh, SEED.value)
    link = host_fetch_bytes_per_s(experts, experts=8)
    figures: dict[str, Any] = {
        "weight_bytes": nbytes((params, experts)),
        "link_bytes_per_s": link,
        "batch": {str(job.batch): time_job(cfg, params, experts, mesh, job, link) for job in jobs},
    }
    stats = device.memory_stats() or {}
    figures["device_bytes_in_use"] = stats.get("bytes_in_use")
    return figures | {"gpu": device.platform in ("cuda", "gpu"), "device": device.device_kind}


def random_model(cfg: DecoderConfig, mesh: Mesh, seed: int) -> tuple[DecoderParams, GatedWeights]:
    """Weights of unit gain: experts in `pinned_host`, made on the device one stack at a time."""
    key = jax.random.key(seed)
    # What is not returned is never made: the experts of `init_decoder` cost nothing here.
    init = jax.jit(lambda key: split_experts(init_decoder(key, cfg), cfg)[0])
    params = jax.device_put(init(key), device_sharding(mesh))
    shapes = jax.eval_shape(lambda key: split_experts(init_decoder(key, cfg), cfg)[1], key)
    leaves = []
    for i, leaf in enumerate(jax.tree.leaves(shapes)):
        made = random_stack(jax.random.fold_in(key, i + 1), leaf.shape, leaf.dtype)
        leaves.append(jax.block_until_ready(jax.device_put(made, host_sharding(mesh, EXPERT_SPEC))))
        made.delete()
    return params, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@partial(jax.jit, static_argnums=(1, 2))
def random_stack(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal matrices [L, E, A, B] of variance 1 / A, a layer at a time to bound temporaries."""

    def layer(carry, i):
        noise = jax.random.normal(jax.random.fold_in(key, i), shape[1:], dtype)
        return carry, noise * jnp.asarray(shape[2] ** -0.5, dtype)

    return jax.lax.scan(layer, None, jnp.arange(shape[0]))[1]


def time_job(
    cfg: DecoderConfig,
    params: DecoderParams,
    experts: GatedWeights,
    mesh: Mesh,
    job: Work,
    link_bytes_per_s: float,
) -> dict[str, Any]:
    """Figures of one batch size: those of `generate`, and the share of the link that was used."""
    capacity, lanes = job.prompt + job.new_tokens, LANES.value
    offload = plan_offload(
        parse_budget(BUDGET.value), cfg, params, experts, mesh,
        batch=job.batch, capacity=capacity, lanes=lanes,
    )  # fmt: skip
    assert offload is not None
    engine = make_engine(
        params, experts, cfg, mesh, capacity=capacity, offload=offload,
        prediction=prediction.next_gate(params, cfg) if lanes else None,
    )  # fmt: skip
    tokens = jnp.asarray(job.tokens())
    mask = jnp.ones(tokens.shape, bool)
    result = decode.generate(
        decode.compiled(engine, tokens, mask), tokens, mask, max_new_tokens=job.new_tokens,
        stop=frozenset(), seed=0, temperature=0.0, top_p=1.0, show=lambda tokens: None,
    )  # fmt: skip
    figures = decode.figures(engine, result)
    moved = figures["bytes_per_token"] * figures["tokens_per_s"]
    return figures | {"num_slots": offload.num_slots, "fraction_of_link": moved / link_bytes_per_s}


def show(figures: dict[str, Any]) -> None:
    """Prints both sides, a row per batch size."""
    table = Table("side", "batch", "first token s", "tokens/s", "of the link")
    for side in SIDES:
        found = figures[side]
        for size, one in found["batch"].items() if isinstance(found, dict) else ():
            share = f"{one['fraction_of_link']:.2f}" if "fraction_of_link" in one else ""
            table.add_row(side, size, f"{one['ttft_s']:.2f}", f"{one['tokens_per_s']:.2f}", share)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    flags.set_default(SHAPE, "mixtral-8x7b")
    flags.set_default(BUDGET, "24GiB")
    cli.run(main)
