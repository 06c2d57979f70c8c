"""Collectives by size: what the compiler's own and schedules of ours move, and how fast here.

    python -m experiments.bench.collectives --json=results/collectives.json \
        --csv=results/collectives.csv --bandwidth_plot=results/collectives.png

On 8 CPU devices, `{"data": 2, "expert": 4}`. Bandwidths are those of nccl-tests: `algbw` is the
size over the seconds, `busbw` what the busiest link carries of it: times 2 (n - 1) / n for an
all-reduce, (n - 1) / n for reduce-scatter, all-gather and all-to-all, 1 for a broadcast. Sizes are
the larger of what a rank brings and what it returns. CPU devices share cores and a memory: the
seconds say nothing of a fabric (rung *time*, of this machine); the bytes are exact (*schedule*).

`bytes_checked` are the schedules' own by mesh axis, `bytes_in_hlo` those of the compiled program.
Beyond 64 MiB the ragged all-to-all is left out: its emulation on CPU gathers all rows on all ranks.
"""

import csv
import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.bench.timing import ROUNDS, interleave
from experiments.plot_file import png_of
from moejax.aot.hlo import parse_hlo
from moejax.collectives.builders import BUILDERS, hierarchical_all_reduce, native
from moejax.collectives.codecs import BlockQuant
from moejax.collectives.compose import with_codec
from moejax.collectives.flat import all_reduce
from moejax.collectives.inspect import inspect_collectives
from moejax.collectives.lower import run_schedule
from moejax.collectives.schedule import Operation, Schedule
from moejax.collectives.traffic import traffic
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.dispatch.ragged import cut_pieces, ragged_exchange

SIZES = flags.DEFINE_list(
    "sizes", [str(2**power) for power in (10, 16, 20, 24, 28)], "bytes, up to 2**28"
)
CHOSEN = flags.DEFINE_list("collectives", None, "some of them by name; default: all")
CSV = flags.DEFINE_string("csv", None, "where to write a row per collective and size")
PLOT = flags.DEFINE_string(
    "bandwidth_plot", None, "where to write bus bandwidths over size, as PNG"
)
AXES = {"data": 2, "expert": 4}
RANKS, NAMES = 8, tuple(AXES)
MOST_RAGGED = 2**26  # 4 GiB of gathered rows
MOST_ROUNDS_BYTES = 2**30  # per arm: a call of 256 MiB takes seconds
FACTORS: dict[Operation, float] = {
    "all_reduce": 2 * (RANKS - 1) / RANKS,
    "reduce_scatter": (RANKS - 1) / RANKS,
    "all_gather": (RANKS - 1) / RANKS,
    "all_to_all": (RANKS - 1) / RANKS,
    "broadcast": 1.0,
}


def schedules() -> dict[str, tuple[Operation, Schedule]]:
    """(operation, schedule) by name: the compiler's own, and ours."""
    found: dict[str, tuple[Operation, Schedule]] = {
        f"native_{op}": (op, native(AXES, op)) for op in FACTORS if op != "broadcast"
    }
    for name, builder in BUILDERS.items():
        if builder.operation in FACTORS:
            found[name] = builder.operation, builder.build(AXES)
    coded = with_codec(hierarchical_all_reduce(AXES), BlockQuant(), "data")
    return found | {"hierarchical_int8": ("all_reduce", coded)}


def runner(schedule: Schedule) -> Callable[[jax.Array], jax.Array]:
    """A function of rows [C, n]; all-reduces with a codec need no other."""
    return lambda x: run_schedule(schedule, x)[0]


def chunk_elements(schedule: Schedule, nbytes: int) -> int:
    """Float32 elements of a chunk when the larger operand of a rank has `nbytes`."""
    return max(1, nbytes // 4 // max(len(schedule.start[0]), len(schedule.end[0])))


def compiled_bytes(run: Callable, mesh: Mesh, rows: int, n: int) -> tuple[Any, dict[str, int]]:
    """The program of flat rows, compiled for the mesh, and its bytes on the wire by axis."""
    spec = P(NAMES)
    mapped = jax.shard_map(
        lambda x: run(x.reshape(rows, n)), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct((rows * RANKS * n,), jnp.float32, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(mapped).lower(x).compile()
    found = inspect_collectives(parse_hlo(compiled.as_text() or ""), mesh)
    moved = dict.fromkeys(NAMES, 0)
    for (_, axis), part in found.traffic.items():
        moved[axis] += part.nbytes
    return compiled, moved


def checked_bytes(schedule: Schedule, n: int) -> dict[str, int]:
    """What the schedule says, by axis."""
    return {axis: part.nbytes for axis, part in traffic(schedule, 4 * n).items()}


def ragged() -> Callable[[jax.Array], jax.Array]:
    """Rows [64, n] to random ranks; emulated on CPU, which has no such collective."""
    owner = np.sort(np.random.default_rng(0).integers(0, RANKS, (RANKS, 64)), axis=1)
    sizes = np.stack([np.bincount(row, minlength=RANKS) for row in owner]).astype(np.int32)
    rows = int(sizes.sum(0).max())

    def run(x: jax.Array) -> jax.Array:
        return ragged_exchange(x, cut_pieces(jnp.asarray(sizes), rows), rows, NAMES)

    return run


def measure(
    nbytes: int, rounds: int, names: list[str] | None = None
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Seconds, the least of all rounds, and bytes of every collective, or of those named."""
    mesh = make_mesh(**AXES)
    arms, facts = {}, {}
    jobs: dict[str, tuple] = {
        name: (op, runner(one), len(one.start[0]), chunk_elements(one, nbytes), one)
        for name, (op, one) in schedules().items()
    }
    if nbytes <= MOST_RAGGED:
        width = max(1, nbytes // 4 // 64)
        jobs["ragged_all_to_all"] = "all_to_all", ragged(), 64, width, None
    jobs = {name: job for name, job in jobs.items() if names is None or name in names}
    # 256 MiB per rank are 2 GiB: arms read the same rows, whatever their shapes.
    sharding = NamedSharding(mesh, P(NAMES))
    rows_of = functools.cache(lambda size: jax.device_put(np.ones(size, np.float32), sharding))
    for name, (operation, run, rows, n, schedule) in jobs.items():
        compiled, moved = compiled_bytes(run, mesh, rows, n)
        x = rows_of(rows * RANKS * n)
        arms[name] = lambda compiled=compiled, x=x: compiled(x)
        facts[name] = {
            "operation": operation,
            "nbytes": 4 * n * (rows if schedule is None else max(rows, len(schedule.end[0]))),
            "bytes_in_hlo": moved,
            "bytes_checked": checked_bytes(schedule, n) if schedule else None,
        }
    seconds = interleave(arms, rounds=max(3, min(rounds, MOST_ROUNDS_BYTES // nbytes)), warmup=1)
    # What else a machine does only adds, and much of it to calls of seconds.
    return {name: {"seconds": min(seconds[name])} for name in jobs}, facts


def int8_over_slices() -> dict[str, Any]:
    """The hierarchical int8 all-reduce against the plain one: bytes over `data`, error, bits."""
    plain = hierarchical_all_reduce(AXES)
    coded = with_codec(plain, BlockQuant(), "data")
    x = np.random.default_rng(0).standard_normal((RANKS, 2**18)).astype(np.float32)
    mesh, spec = make_mesh(**AXES), P(NAMES)
    mapped = jax.shard_map(
        lambda x: (all_reduce(coded, x), lax.psum(x, NAMES)), mesh=mesh, in_specs=spec,
        out_specs=(spec, P()),
    )  # fmt: skip
    ours, exact = (np.asarray(y, np.float64) for y in jax.jit(mapped)(x))
    chunk = x.shape[1] // plain.num_chunks
    sent = [checked_bytes(one, chunk)["data"] for one in (plain, coded)]
    return {
        "cross_slice_reduction": sent[0] / sent[1],
        "relative_error": float(np.linalg.norm(ours[0] - exact[0]) / np.linalg.norm(exact[0])),
        "ranks_identical": bool((ours == ours[0]).all()),
    }


def draw(records: list[dict], path: str) -> None:
    """Bus bandwidth over size, a panel per operation."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(FACTORS), figsize=(4 * len(FACTORS), 3.4))
    for panel, operation in zip(panels, FACTORS, strict=True):
        names = dict.fromkeys(r["name"] for r in records if r["operation"] == operation)
        for name in names:
            points = [(r["nbytes"], r["busbw"]) for r in records if r["name"] == name]
            panel.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
        panel.set(xscale="log", yscale="log", title=operation, xlabel="bytes")
        if names:
            panel.legend(fontsize=5)
    panels[0].set(ylabel="busbw, GB/s")
    cli.write_bytes(path, png_of(figure, dpi=110, tight=True))


def table_of(records: list[dict]) -> str:
    """The records as CSV."""
    columns = ["name", "operation", "nbytes", "seconds", "algbw", "busbw"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def main() -> None:
    for path in (cli.JSON.value, CSV.value, PLOT.value):
        cli.check_writable(path)
    check(len(SIZES.value) > 0, "--sizes= names no size")
    sizes = []
    for text in SIZES.value:
        check(text.isdigit() and 4 <= int(text) <= 2**28, f"--sizes: {text!r} is not in 4..2**28")
        sizes.append(int(text))
    cli.use_cpu_devices(RANKS)
    for name in CHOSEN.value or ():
        known = [*schedules(), *(["ragged_all_to_all"] if max(sizes) <= MOST_RAGGED else [])]
        check(name in known, f"--collectives: {name!r} is not one of {', '.join(known)}")
    records: list[dict[str, Any]] = []
    for nbytes in sizes:
        times, facts = measure(nbytes, ROUNDS.value, CHOSEN.value)
        for name, fact in facts.items():
            algbw = fact["nbytes"] / times[name]["seconds"] / 1e9
            busbw = algbw * FACTORS[fact["operation"]]
            records.append({"name": name, **fact, **times[name], "algbw": algbw, "busbw": busbw})
    by_name: dict[str, dict] = {"algbw": {}, "busbw": {}, "bytes_checked": {}, "bytes_in_hlo": {}}
    for record in records:
        for figure, values in by_name.items():
            values.setdefault(record["name"], {})[str(record["nbytes"])] = record[figure]
    table = Table("collective", "bytes", "ms", "algbw GB/s", "busbw GB/s")
    for r in records:
        ms = f"{1e3 * r['seconds']:.2f}"
        table.add_row(r["name"], str(r["nbytes"]), ms, f"{r['algbw']:.3f}", f"{r['busbw']:.3f}")
    Console().print(table)
    cli.write_report("bench/collectives", "time", by_name | int8_over_slices())
    if CSV.value:
        cli.write_text(CSV.value, table_of(records))
    if PLOT.value:
        draw(records, PLOT.value)


if __name__ == "__main__":
    cli.run(main)
