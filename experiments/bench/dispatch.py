"""What each dispatch strategy costs on 8 CPU devices: time, rows, bytes on the wire, drops.

    python -m experiments.bench.dispatch --json=results/dispatch.json

One MoE layer forward, experts over 8 ranks, uniform routing, equal total work in every arm. `local`
is the same layer on one device. CPU devices share the cores and a memory: the times say what a
strategy computes beside the experts, the rows and bytes what it would ask of a network.

`incidence_rows` counts pairs of a token and a group that holds one of its experts, from the choices
alone; `valid_rows` what was really sent, `wire_bytes` what the compiled program moves, padding
included, per mesh axis: a message is charged to the outermost axis that it crosses.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.bench.timing import ROUNDS, interleave, summary
from experiments.routed import serve_routed
from moejax.aot.hlo import parse_hlo
from moejax.collectives.inspect import inspect_collectives
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.costmodel.hierarchy import incidences
from moejax.dispatch.all_to_all import slots_per_group
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.exchange import exchange
from moejax.dispatch.hierarchical import send
from moejax.dispatch.slots import FITS_ALL, Capacity, assign_slots
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.stage import resident
from moejax.routing.gates import balanced_choice

TOKENS = flags.DEFINE_integer("tokens", 2048, "tokens of all ranks", lower_bound=8)
EXPERTS, TOP_K, MODEL_DIM, HIDDEN_DIM = 64, 8, 256, 128
AXES = ("data", "expert")
NODES, CHIPS = 2, 4
ROOM = Capacity(factor=1.25)


def strategies() -> dict[str, dict[str, Any]]:
    """Arguments of `make_dispatch` for every arm; experts lie over both axes."""
    flat = {"axis": AXES}
    levels = {"levels": AXES, "capacity": Capacity(factor=1.2)}
    return {
        "gather": {"name": "gather", **flat},
        "all_to_all": {"name": "all_to_all", **flat, "capacity": ROOM, "per": "rank"},
        "all_to_all_shifted": {
            "name": "all_to_all",
            **flat,
            "capacity": ROOM,
            "per": "rank",
            "lowering": "shifted",
        },
        "flat_deduplicated": {"name": "hierarchical", "levels": (AXES,), "capacity": ROOM},
        "hierarchical": {"name": "hierarchical", **levels},
        "pipelined": {"name": "hierarchical", **levels, "num_chunks": 2},
        "dropless": {"name": "hierarchical", **levels, "fall_back": True},
        "ragged_emulated": {"name": "ragged", **flat, "capacity": ROOM},
        "grouped": {"name": "grouped", **flat, "gate": "balanced_groups", "num_groups": 8},
        "materialize": {"name": "materialize", **flat, "num_copies": EXPERTS},
    }


def make_inputs(num_tokens: int) -> tuple[tuple, tuple]:
    """(x, topk_idx, topk_weights, experts) with uniform choices, and with balanced ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    experts = init_experts(
        keys[0], (EXPERTS,), MODEL_DIM, HIDDEN_DIM, out_scale=1.0, dtype=jnp.float32
    )
    x = jax.random.normal(keys[1], (num_tokens, MODEL_DIM))
    scores = jax.random.uniform(keys[2], (num_tokens, EXPERTS))
    weights = jnp.full((num_tokens, TOP_K), 1 / TOP_K)
    uniform = jax.lax.top_k(scores, TOP_K)[1].astype(jnp.int32)
    balanced = balanced_choice(scores, TOP_K, 8)
    return (x, uniform, weights, experts), (x, balanced, weights, experts)


def one_hot(x, topk_idx, topk_weights, experts):
    """y [T, D] and the count of drops, as GShard spells it: slots by products with one-hot masks.

    The classic in einsum form (arXiv 2006.16668, algorithm 1), for comparison: T * E * C * D
    operations to move rows, and a mask of T * E * C.
    """
    ranks = NODES * CHIPS
    size = slots_per_group(x.shape[0], TOP_K, EXPERTS, ranks, ROOM, "expert")
    slots, overflow = assign_slots(topk_idx, EXPERTS, size)
    mask = jax.nn.one_hot(slots.slot, EXPERTS * size)  # [T, K, E * C]
    rows = jnp.einsum("tks,td->sd", mask, x).reshape(ranks, -1, MODEL_DIM)
    rows = exchange(rows, AXES).reshape(ranks, EXPERTS // ranks, size, MODEL_DIM).swapaxes(0, 1)
    y = jax.vmap(gated_mlp)(experts, rows.reshape(EXPERTS // ranks, -1, MODEL_DIM))
    y = y.reshape(EXPERTS // ranks, ranks, size, MODEL_DIM).swapaxes(0, 1)
    y = exchange(y.reshape(ranks, -1, MODEL_DIM), AXES).reshape(-1, MODEL_DIM)
    y = jnp.einsum("tks,tk,sd->td", mask, topk_weights, y)
    return y, jax.lax.psum(jnp.sum(overflow, dtype=jnp.int32), AXES)


def sent_rows(mesh: Mesh, topk_idx: jax.Array, levels: tuple) -> list[int]:
    """Rows that a hierarchical dispatch sends at each level, of all ranks."""

    def body(idx):
        ones = jnp.ones(idx.shape, jnp.float32)
        routing = Routing(topk_idx=idx, topk_weights=ones, router_logits=ones)
        _, _, sent = send(
            ones,
            routing,
            num_experts=EXPERTS,
            levels=levels,
            capacities=(FITS_ALL,) * len(levels),
        )
        return jax.lax.psum(sent.rows, AXES)

    run = jax.shard_map(body, mesh=mesh, in_specs=P(AXES), out_specs=P())
    return jax.jit(run)(topk_idx).tolist()


def crossings(topk_idx: np.ndarray) -> dict[str, int]:
    """Rows that must cross each axis, one way, when each goes once per group that wants it."""
    ranks = NODES * CHIPS
    home = np.arange(len(topk_idx)) // (len(topk_idx) // ranks)
    wants = (topk_idx // (EXPERTS // ranks))[:, :, None] == np.arange(ranks)
    wants = wants.any(1).reshape(-1, NODES, CHIPS)
    other_node = np.arange(NODES)[None] != (home // CHIPS)[:, None]
    other_chip = np.arange(CHIPS)[None] != (home % CHIPS)[:, None]
    return {
        "data": int((wants.any(2) & other_node).sum()),
        "expert": int((wants & other_chip[:, None]).sum()),
    }


def compile_arm(run: Callable, mesh: Mesh, inputs: tuple) -> tuple:
    """The compiled layer on placed inputs, its bytes on the wire per mesh axis, and temporaries."""
    specs = (P(AXES),) * 4
    body = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P(AXES), P()))
    placed = jax.device_put(inputs, tuple(NamedSharding(mesh, spec) for spec in specs))
    compiled = jax.jit(body).lower(*placed).compile()
    traffic = inspect_collectives(parse_hlo(compiled.as_text() or ""), mesh).traffic
    moved = dict.fromkeys(AXES, 0)
    for (_, axis), part in traffic.items():
        moved[axis] += part.nbytes
    memory = compiled.memory_analysis()
    assert memory is not None
    return partial(compiled, *placed), moved, memory.temp_size_in_bytes


def check_values(name: str, run: Callable, want: jax.Array) -> int:
    """Runs an arm once: equal to one device when nothing is dropped. Returns the drops."""
    y, dropped = run()
    error, scale = np.abs(np.asarray(y) - np.asarray(want)).max(), np.abs(np.asarray(want)).max()
    if not dropped and error > 1e-5 * scale:
        raise RuntimeError(f"{name} differs from local by {error}, values reach {scale}")
    return int(dropped)


def row_counts(mesh: Mesh, topk_idx: jax.Array) -> dict[str, Any]:
    """Rows sent with room for all, and the incidences that they must equal."""
    idx = np.asarray(topk_idx)
    to_nodes, to_chips = (
        int(incidences(idx, EXPERTS, groups).sum()) for groups in (NODES, NODES * CHIPS)
    )
    wanted = {"flat_deduplicated": [to_chips], "hierarchical": [to_nodes, to_chips]}
    levels = {"flat_deduplicated": (AXES,), "hierarchical": AXES}
    return {
        "valid_rows": {name: sent_rows(mesh, topk_idx, levels[name]) for name in levels},
        "incidence_rows": wanted,
        "assignments": idx.size,
    }


def padding(moved: dict[str, int], topk_idx: np.ndarray) -> dict[str, float]:
    """Bytes there and back over those of rows that must travel: slack, ids and weights."""
    must = crossings(topk_idx)
    return {axis: moved[axis] / (2 * must[axis] * 4 * MODEL_DIM) for axis in AXES}


def main() -> None:
    cli.check_writable(cli.JSON.value)
    ranks = NODES * CHIPS
    check(
        TOKENS.value % (2 * ranks) == 0,
        f"--tokens={TOKENS.value} is not divisible by {2 * ranks} (2 chunks, {ranks} ranks)",
    )
    cli.use_cpu_devices(ranks)
    mesh = make_mesh(data=NODES, expert=CHIPS)
    uniform, balanced = make_inputs(TOKENS.value)
    local = jax.jit(partial(serve_routed, resident))
    arms: dict[str, Callable] = {"local": partial(local, *uniform)}
    wire, drops, temporary = {}, {}, {}
    layer = dict(num_experts=EXPERTS, token_axes=AXES)
    runs = {
        name: partial(serve_routed, make_dispatch(**layer, **arguments))
        for name, arguments in strategies().items()
    }
    for name, run in {**runs, "one_hot": one_hot}.items():
        inputs = balanced if name == "grouped" else uniform
        arms[name], wire[name], temporary[name] = compile_arm(run, mesh, inputs)
        drops[name] = check_values(name, arms[name], local(*inputs)[0])
    seconds = interleave(arms, rounds=ROUNDS.value)
    ratios = {
        name: statistics.median(t / b for t, b in zip(times, seconds["local"], strict=True))
        for name, times in seconds.items()
        if name != "local"
    }
    table = Table(
        "strategy", "time / local", *(f"MiB over {a}" for a in AXES), "temporary MiB", "dropped"
    )
    for name, ratio in ratios.items():
        moved = (f"{wire[name][axis] / 2**20:.2f}" for axis in AXES)
        row = (*moved, f"{temporary[name] / 2**20:.1f}", str(drops[name]))
        table.add_row(name, f"{ratio:.2f}", *row)
    Console(width=None if Console().is_terminal else 110).print(table)
    figures = row_counts(mesh, uniform[1]) | {
        "wire_bytes": wire,
        "wire_over_incidences": padding(wire["hierarchical"], np.asarray(uniform[1])),
        "temporary_bytes": temporary,
        "dropped": drops,
        "time_ratio_vs_local": ratios,
        "arms": {name: summary(times) for name, times in seconds.items()},
        "tokens": TOKENS.value,
        "row_bytes": 4 * MODEL_DIM,
    }
    cli.write_report("bench/dispatch", "time", figures)


if __name__ == "__main__":
    cli.run(main)
