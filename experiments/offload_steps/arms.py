"""Engines that serve the same sequences in different ways, stepped in turns and timed."""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.bench.timing import interleave
from experiments.offload_steps.policies import LOW_FORMAT, Policy
from moejax.costmodel.miss import MissCosts
from moejax.costmodel.offload_bounds import serial_s, shared_bound_s
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.offload.columns import split_columns
from moejax.offload.precision import in_two_precisions
from moejax.offload.source import Store, moved_bytes, shapes_of
from moejax.offload.store import expert_bytes, to_host
from moejax.serving.engine import Engine, make_engine
from moejax.serving.prediction import Prediction

RESIDENT = "resident"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Weights that all arms share, and what they decode."""

    cfg: DecoderConfig
    params: DecoderParams
    experts: GatedWeights  # [L, E, ...], on the device
    mesh: Mesh
    prompts: jax.Array  # int32 [B, S]
    capacity: int


class Arm:
    """An engine and its running session, behind its prompts."""

    def __init__(self, engine: Engine, model: Model, preload: np.ndarray | None):
        self.engine = engine
        session = engine.start(len(model.prompts))
        if preload is not None:
            session = engine.preload(session, jnp.asarray(preload[None], jnp.int32))
        mask = jnp.ones(model.prompts.shape, bool)
        self.session, token, _ = engine.prefill(session, model.prompts, mask)
        self.tokens, self.metrics = [token], []

    def step(self) -> jax.Array:
        self.session, token, metrics = self.engine.step(self.session)
        self.tokens.append(token)
        self.metrics.append(metrics)
        return token

    def count(self, name: str, skip: int) -> float:
        """Mean over steps of a metric summed over layers, without the first `skip`."""
        return float(np.mean([np.sum(getattr(one, name)) for one in self.metrics[skip:]]))


def resident_arm(model: Model) -> Arm:
    engine = make_engine(
        model.params, model.experts, model.cfg, model.mesh, capacity=model.capacity
    )
    return Arm(engine, model, None)


def hot_granules(arm: Arm, slots: int) -> np.ndarray:
    """int32 [slots]: the experts that the arm's steps used most, equally many of each layer."""
    uses = np.sum([np.asarray(one.expert_load) for one in arm.metrics], axis=0)  # [L, E]
    layers, experts = uses.shape
    quota = slots // layers + (np.arange(layers) < slots % layers)
    order = np.argsort(-uses, axis=1, kind="stable")
    rows = [layer * experts + order[layer, : quota[layer]] for layer in range(layers)]
    return np.concatenate(rows).astype(np.int32)


def make_stores(model: Model, policies: list[Policy]) -> dict[tuple[int, bool], Store]:
    """The experts in host memory by number of column parts, and whether in two precisions."""
    parts = sorted({one.column_parts for one in policies})
    whole = {n: to_host(split_columns(model.experts, n), model.mesh) for n in parts}
    stores: dict[tuple[int, bool], Store] = {(n, False): whole[n] for n in parts}
    for n in {one.column_parts for one in policies if one.is_lossy}:
        stores[n, True] = in_two_precisions(whole[n], LOW_FORMAT)
    return stores


def offloaded_arm(
    model: Model,
    policy: Policy,
    store: Store,
    slots: int,
    costs: MissCosts,
    hot: np.ndarray,
    ahead: Prediction,
) -> Arm:
    """An arm of `policy` with `slots` whole experts on the device; `hot` fills a static cache.

    Policies with lanes fetch what `ahead` predicts.
    """
    cfg = model.cfg
    offload = policy.config(slots, cfg.num_moe_layers, cfg.moe.num_experts, costs)
    engine = make_engine(
        model.params, store, cfg, model.mesh, capacity=model.capacity,
        offload=offload, prediction=ahead if policy.lanes and not policy.admission else None,
    )  # fmt: skip
    return Arm(engine, model, hot if policy.keep == "static" else None)


def time_arms(arms: dict[str, Arm], *, steps: int) -> dict[str, float]:
    """Median seconds of a step of each arm, stepped in turns."""
    seconds = interleave({name: arm.step for name, arm in arms.items()}, rounds=steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def arm_figures(
    arm: Arm, seconds: float, resident_s: float, copy_s: float, costs: MissCosts, *, skip: int
) -> dict[str, Any]:
    """What a policy was worth. `copy_s` moves a whole expert at the best measured rate."""
    store = arm.engine.experts
    shapes = shapes_of(store)
    parts = shapes.w_gate.shape[1] // arm.engine.cfg.moe.num_experts
    lookups, hits, fetches, low, prefetches, wasted, on_host = (
        arm.count(name, skip)
        for name in (
            "lookups", "hits", "demand_fetches", "low_fetches", "prefetches", "prefetches_wasted",
            "host_computes",
        )
    )  # fmt: skip
    batch, whole = len(arm.tokens[0]), expert_bytes(shapes) * parts
    on_demand = moved_bytes(store, fetches=fetches, low_fetches=low) / whole
    moved, missing = on_demand + prefetches / parts, on_demand + on_host / parts
    bound_s = _bound_s(arm, resident_s, moved, missing, copy_s, costs)
    return {
        "ms_per_step": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "fraction_of_bound": bound_s / seconds,
        "bound_ms": 1e3 * bound_s,
        "hit_rate": hits / lookups,
        "moved_bytes_per_token": moved * whole / batch,
        "wasted_bytes_per_token": wasted / parts * whole / batch,
        "host_computed_experts": on_host / parts,
        "low_precision_fetches": low / parts,
    }


def _bound_s(arm, resident_s, moved, missing, copy_s, costs):
    """On CPU one processor computes and copies, so its times add up; else link and host share."""
    if arm.engine.mesh.devices.flat[0].platform == "cpu":
        return serial_s(resident_s, moved * copy_s)
    return shared_bound_s(resident_s, missing * copy_s, tau_s=copy_s, host_s=costs.host_read_s)


def check_tokens(arms: dict[str, Arm], policies: dict[str, Policy]) -> dict[str, bool]:
    """Whether each arm decoded the resident tokens; on CPU, an exact policy that did not raises."""
    tokens = {name: np.stack(arm.tokens) for name, arm in arms.items()}
    same = {name: bool(np.array_equal(t, tokens[RESIDENT])) for name, t in tokens.items()}
    on_cpu = jax.default_backend() == "cpu"
    wrong = [n for n, p in policies.items() if on_cpu and p.is_exact and not same[n]]
    if wrong:
        raise RuntimeError(f"other tokens than resident: {', '.join(wrong)}")
    return same
