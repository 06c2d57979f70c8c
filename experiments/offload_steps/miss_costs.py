"""What a miss costs on this machine, by the compiled offloaded stage itself."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import interleave
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.structs import Routing
from moejax.costmodel.miss import MissCosts
from moejax.experts.stage import Stage, stacked
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.columns import by_columns, split_columns
from moejax.offload.misses import Serve
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import to_host

# Equal costs: half of the parts move, as on a machine whose host is as fast as its link.
_EVEN = MissCosts(fetch_s=1.0, host_read_s=1.0, host_row_s=1e-9)
_SERVE: dict[str, Serve] = {"fetch": "fetch", "host": "host", "columns": "divide"}
WAYS = ("resident", "fetch", "host", "columns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misses:
    """A pass over all layers in which `top_k` experts of each are wanted by `rows` tokens."""

    experts: GatedWeights  # [L, E, ...], on the device
    top_k: int
    rows: int

    @property
    def count(self) -> int:
        return self.experts.w_gate.shape[0] * self.top_k


def time_ways(misses: Misses, *, rounds: int) -> dict[str, float]:
    """Least seconds per miss of each of `WAYS`, all layers' misses in one program.

    `resident` computes what the others miss: nothing is moved. In `columns` half of every expert is
    moved and the host computes the other half. No call finds anything in the cache: pass p wants
    other experts than pass p - 1.
    """
    arms = {name: _arm(misses, name) for name in WAYS}
    seconds = interleave(arms, rounds=rounds)
    return {name: min(times) / misses.count for name, times in seconds.items()}


def fit_costs(by_rows: Mapping[int, Mapping[str, float]]) -> MissCosts:
    """Costs of one expert out of `time_ways` at few and at many rows.

    A transfer is what `fetch` takes beyond `resident`; the host's time at the fewest rows is that
    of reading, and at the most rows divided by them that of a row. Raises `InputError` where
    something else took so much of the machine that moving an expert seems to cost nothing.
    """
    few, many = min(by_rows), max(by_rows)
    fetch, resident = by_rows[few]["fetch"], by_rows[few]["resident"]
    check(
        fetch > resident,
        f"a fetched expert took {1e6 * fetch:.0f} us, a resident one {1e6 * resident:.0f}: the "
        "machine is too busy to measure what a miss costs; run again",
    )
    return MissCosts(
        fetch_s=fetch - resident,
        host_read_s=by_rows[few]["host"],
        host_row_s=by_rows[many]["host"] / many,
    )


def measure_costs(experts: GatedWeights, top_k: int, *, rounds: int = 5) -> MissCosts:
    """Costs of one expert of `experts` [L, E, ...] on the device, at 1 and at 32 rows."""
    return fit_costs(
        {
            rows: time_ways(Misses(experts=experts, top_k=top_k, rows=rows), rounds=rounds)
            for rows in (1, 32)
        }
    )


def _arm(misses: Misses, name: str) -> Callable[[], jax.Array]:
    layers, num_experts, d_model = misses.experts.w_gate.shape[:3]
    parts = 2 if name == "columns" else 1
    x = jax.random.normal(jax.random.key(0), (misses.rows, d_model), misses.experts.w_gate.dtype)
    if name == "resident":
        state, store, make = None, misses.experts, stacked
    else:
        costs = _EVEN if name == "columns" else None
        cfg = OffloadConfig(num_slots=layers, serve=_SERVE[name], costs=costs, column_parts=parts)
        split = split_columns(misses.experts, parts)
        store, state = to_host(split, make_mesh()), init_state(split, cfg)
        make = partial(_by_cfg, cfg=cfg)
    run = jax.jit(partial(_pass, make, misses), donate_argnums=2)
    turns = max(1, num_experts // misses.top_k)
    passes, carry = itertools.count(), [state]

    def call() -> jax.Array:
        first = jnp.int32(next(passes) % turns * misses.top_k)
        y, carry[0] = run(store, x, carry[0], first)
        return y

    return call


def _by_cfg(store: GatedWeights, *, cfg: OffloadConfig) -> Stage:
    return by_columns(offloaded(store, cfg), cfg.column_parts)


def _pass(make, misses: Misses, store, x, state, first):
    """All layers in turn, each wanting experts [first, first + top_k)."""
    layers, num_experts = misses.experts.w_gate.shape[:2]
    stage = make(store)
    idx = (first + jnp.arange(misses.top_k, dtype=jnp.int32)) % num_experts
    routing = Routing(
        topk_idx=jnp.broadcast_to(idx[None], (misses.rows, misses.top_k)),
        topk_weights=jnp.full((misses.rows, misses.top_k), 1 / misses.top_k, jnp.float32),
        router_logits=jnp.zeros((misses.rows, num_experts), jnp.float32),
    )

    def layer(carry, index):
        x, state = carry
        y, state, _ = stage(x, routing, None, index, state)
        return (x + jnp.mean(y, axis=1), state), None

    index = jnp.arange(layers, dtype=jnp.int32)
    (y, state), _ = jax.lax.scan(layer, (x, state), index)
    return y, state


def random_experts(
    layers: int, num_experts: int, d_model: int, d_ff: int, dtype: jnp.dtype
) -> GatedWeights:
    """Experts [L, E, ...] of unit gain."""
    rng = np.random.default_rng(0)

    def stack(rows: int, columns: int) -> jax.Array:
        noise = rng.standard_normal((layers, num_experts, rows, columns), np.float32)
        return jnp.asarray(noise / rows**0.5, dtype)

    return GatedWeights(
        w_gate=stack(d_model, d_ff), w_up=stack(d_model, d_ff), w_down=stack(d_ff, d_model)
    )
