"""Fits what collectives and products cost on the mesh of this machine, and chooses with that.

    python -m scripts.calibrate --data_ranks=2 --expert_ranks=4 --cpu_devices=8 --json=OUT

For every level that a hierarchical dispatch may have over the axes `data` and `expert`, times an
all-to-all, all-gather and reduce-scatter of several sizes, and products of several numbers of rows;
fits alpha + beta * n to the medians (FSMoE, arXiv 2501.10714, section 4.1) and reports how well the
line fits. Then says which levels and how many chunks the model advises for a layer, and why.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.bench.timing import ROUNDS, interleave
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.costmodel.advice import Calibration, LayerShape, advise
from moejax.costmodel.hierarchy import Level, candidate_levels
from moejax.costmodel.links import Fit, fit_link

DATA = flags.DEFINE_integer("data_ranks", 1, "outer mesh axis, the slower links", lower_bound=1)
EXPERT = flags.DEFINE_integer("expert_ranks", 1, "inner mesh axis", lower_bound=1)
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "on CPU: make so many", lower_bound=1)
KIB = flags.DEFINE_list("kib", ["64", "256", "1024", "4096", "8192"], "sizes sent by one rank")
TOKENS = flags.DEFINE_integer(
    "rank_tokens", 1024, "layer to advise on: tokens of a rank", lower_bound=1
)
EXPERTS = flags.DEFINE_integer("num_experts", 64, "its experts", lower_bound=1)
TOP_K = flags.DEFINE_integer("top_k", 8, "experts per token", lower_bound=1)
D_MODEL = flags.DEFINE_integer("d_model", 1024, "its model dim", lower_bound=1)
D_FF = flags.DEFINE_integer("d_ff", 512, "its hidden dim", lower_bound=1)
ROW_BYTES = 4 * 256
KINDS: dict[str, Callable[..., jax.Array]] = {
    "all_to_all": lambda x, axes: jax.lax.all_to_all(x, axes, 0, 0, tiled=True),
    "all_gather": lambda x, axes: jax.lax.all_gather(x, axes, tiled=True),
    "reduce_scatter": lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True),
}


def sizes_of(kib: list[str]) -> list[int]:
    """Bytes; raises `InputError` for what is not a list of three positive numbers or more."""
    check(
        len(kib) >= 3 and all(one.strip().isdigit() and int(one) > 0 for one in kib),
        f"--kib={','.join(kib)} is not three positive whole numbers or more",
    )
    return [1024 * int(one) for one in kib]


def whole_rows(nbytes: int, ranks: int) -> int:
    """`nbytes` rounded to what so many ranks can share: a row each, or several."""
    return max(1, nbytes // (ROW_BYTES * ranks)) * ROW_BYTES * ranks


def collective(kind: str, mesh: Mesh, level: Level, nbytes: int) -> Callable[[], jax.Array]:
    """A compiled collective over `level`, on arrays of `nbytes` per rank (all-gather: results)."""
    rows, axes = nbytes // ROW_BYTES, mesh.axis_names
    if kind == "all_gather":
        rows //= ranks_of(mesh, level)
    x = jax.device_put(jnp.ones((mesh.size * rows, 256), jnp.float32), NamedSharding(mesh, P(axes)))
    body = partial(KINDS[kind], axes=level)
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=P(axes)))
    return partial(run.lower(x).compile(), x)


def ranks_of(mesh: Mesh, level: Level) -> int:
    """Ranks that take part in an exchange of the level."""
    return math.prod(mesh.shape[axis] for axis in level)


def product(rows: int) -> Callable[[], jax.Array]:
    """A compiled product of [rows, d_model] and [d_model, d_ff] on one device."""
    x, w = jnp.ones((rows, D_MODEL.value)), jnp.ones((D_MODEL.value, D_FF.value))
    return partial(jax.jit(jnp.matmul).lower(x, w).compile(), x, w)


def fit_medians(arms: dict[float, Callable[[], Any]], rounds: int) -> Fit:
    """Interleaves the sizes and fits a line to their medians."""
    seconds = interleave({str(n): run for n, run in arms.items()}, rounds=rounds)
    return fit_link(list(arms), [statistics.median(seconds[str(n)]) for n in arms])


def calibrate(mesh: Mesh, sizes: list[int], rounds: int) -> tuple[dict[str, dict[Level, Fit]], Fit]:
    """Fits per kind of collective and level; and of products, over operations instead of bytes."""
    axes = tuple(axis for axis in ("data", "expert") if mesh.shape[axis] > 1)
    levels = dict.fromkeys(level for levels in candidate_levels(axes) for level in levels)
    fits: dict[str, dict[Level, Fit]] = {}
    for kind in KINDS:
        for level in levels:
            rounded = {whole_rows(n, ranks_of(mesh, level)) for n in sizes}
            arms = {float(n): collective(kind, mesh, level, n) for n in sorted(rounded)}
            fits.setdefault(kind, {})[level] = fit_medians(arms, rounds)
    operations = 2.0 * D_MODEL.value * D_FF.value
    return fits, fit_medians({operations * n: product(n) for n in (64, 256, 1024, 2048)}, rounds)


def layer_of_flags() -> LayerShape:
    """The layer to advise on."""
    return LayerShape(
        tokens=TOKENS.value,
        num_experts=EXPERTS.value,
        top_k=TOP_K.value,
        d_model=D_MODEL.value,
        d_ff=D_FF.value,
    )


def main() -> None:
    cli.check_writable(cli.JSON.value)
    sizes = sizes_of(KIB.value)
    if CPU_DEVICES.value:
        cli.use_cpu_devices(CPU_DEVICES.value)
    check(
        DATA.value * EXPERT.value > 1,
        "--data_ranks=1 --expert_ranks=1 is one rank: nothing to calibrate",
    )
    check(
        EXPERTS.value % (DATA.value * EXPERT.value) == 0,
        f"--num_experts={EXPERTS.value} is not divisible by {DATA.value * EXPERT.value} ranks",
    )
    mesh = make_mesh(data=DATA.value, expert=EXPERT.value)
    fits, gemm = calibrate(mesh, sizes, ROUNDS.value)
    sizes_by_axis = {axis: n for axis, n in mesh.shape.items() if n > 1}
    found = Calibration(
        sizes=sizes_by_axis,
        exchange={level: fit.link for level, fit in fits["all_to_all"].items()},
        product=gemm.link,
    )
    advice = advise(found, layer_of_flags())
    flat = {
        f"{kind}.{'+'.join(level)}": fit
        for kind, found in fits.items()
        for level, fit in found.items()
    } | {"product": gemm}
    table = Table("operation", "alpha", "beta, s per byte (operation)", "r2", "worst residual")
    for name, fit in flat.items():
        line = (f"{1e6 * fit.link.alpha_s:.1f} us", f"{fit.link.beta_s_per_byte:.3g}")
        table.add_row(name, *line, f"{fit.r2:.4f}", f"{fit.worst_residual:.0%}")
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(advice.explain())
    figures = {
        "alpha_s": {name: fit.link.alpha_s for name, fit in flat.items()},
        "beta_s_per_byte": {name: fit.link.beta_s_per_byte for name, fit in flat.items()},
        "r2": {name: fit.r2 for name, fit in flat.items()},
        "worst_residual": {name: fit.worst_residual for name, fit in flat.items()},
        "sizes": sizes_by_axis,
        "choice": advice.figures(),
    }
    cli.write_report("calibrate", "time", figures)


if __name__ == "__main__":
    cli.run(main)
