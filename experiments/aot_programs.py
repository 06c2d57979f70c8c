"""Programs to compile ahead of time: the compiled steps whose schedules we make claims about.

A program is a frozen config (changed by `--set field=value`) with a `build` that returns what to
compile for a mesh and how to read the result.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import abstract
from moejax.core.errors import check
from moejax.core.memory import device_sharding, fetch_rows, host_sharding
from moejax.core.mesh import check_divisible
from moejax.costmodel.hardware import get_machine
from moejax.costmodel.miss import MissCosts, expert_cost
from moejax.experts.gated import gated_mlp, init_experts
from moejax.experts.quantize import abstract_quantized
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.registry import find_architecture
from moejax.interop.hf.tensors import read_json
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, moe_decoder
from moejax.models.decoder import init_decoder
from moejax.models.footprint import footprint
from moejax.offload.budget import Footprint, parse_budget, solve_slots
from moejax.offload.columns import split_columns
from moejax.offload.misses import Serve
from moejax.offload.policies import PolicyName
from moejax.offload.prefetch import FetchMode
from moejax.offload.slots import write_row
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import EXPERT_SPEC, expert_bytes
from moejax.routing.config import RouterConfig
from moejax.serving.engine import split_experts
from moejax.serving.prediction import next_gate
from moejax.serving.programs import AXIS, make_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """A program for one mesh."""

    fn: Callable[..., Any]  # jitted, or plain when nothing is donated
    abstract_args: tuple[Any, ...]
    prefetch_scope: str  # named scope of the transfers that should hide
    compute_scope: str  # named scope of the matrix work that should hide them
    demand_scope: str | None  # named scope of the transfers that the step waits for
    cache_shapes: tuple[tuple[int, ...], ...]  # of one device, never to be copied whole
    host_shapes: tuple[tuple[int, ...], ...]
    device_budget: int | None  # bytes per device
    layers: int = 1  # how often a step runs the loop body that holds the transfers
    wanted_bytes: int = 0  # of the experts that a step may want of one device, all layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One decode step of `moejax.serving`; its kinds say of which model.

    Attributes:
        expert_axis: devices that share the experts; the others of the target stay idle.
        device_budget: as `moejax.offload.budget` reads it, per device; `none` keeps all experts
            on the devices.
        experts_dtype: what the experts are stored as, None for `dtype`.
        workspace_mib: part of the budget left for activations and the compiler's temporaries.
        serve: who serves misses, see `moejax.offload.misses`; `divide` by what a v5e host plans.
        column_parts: see `moejax.offload.columns`.
    """

    batch: int = 1
    capacity: int = 1024
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    experts_dtype: Format | None = None
    expert_axis: int = 1
    device_budget: str = "25%"
    workspace_mib: int = 64
    prefetch_lanes: int = 8
    policy: PolicyName = "lru"
    admission: bool = False
    fetch_mode: FetchMode = "always"
    serve: Serve = "fetch"
    column_parts: int = 1

    def model(self) -> DecoderConfig:
        """The decoder that is compiled."""
        raise NotImplementedError

    def footprint(self, params: Any, experts: GatedWeights, ranks: int) -> Footprint:
        """What one device holds besides slots."""
        sizes = dict(batch=self.batch, capacity=self.capacity, lanes=self.prefetch_lanes)
        wants = footprint(self.model(), params, experts, ranks=ranks, **sizes)
        return dataclasses.replace(wants, workspace_bytes=self.workspace_mib * 2**20)

    def offload(self, wants: Footprint) -> OffloadConfig | None:
        """Slots that the budget buys, None without a budget."""
        budget = parse_budget(self.device_budget)
        if budget is None:
            return None
        return OffloadConfig(
            num_slots=solve_slots(budget, wants, min_slots=wants.num_layers),
            policy=self.policy,
            admission=self.admission,
            prefetch_lanes=self.prefetch_lanes,
            fetch_mode=self.fetch_mode,
            serve=self.serve,
            costs=_planned(wants.expert_bytes) if self.serve == "divide" else None,
            column_parts=self.column_parts,
        )

    def build(self, mesh: Mesh) -> Built:
        """The step, donated session and all, over `expert_axis` devices of `mesh`."""
        cfg = self.model()
        _check_tiles(d_model=cfg.d_model, d_ff=cfg.moe.d_ff)
        local_experts = check_divisible(cfg.moe.num_experts, mesh)
        params, experts = split_experts(
            jax.eval_shape(lambda: init_decoder(jax.random.key(0), cfg)), cfg
        )
        if self.column_parts > 1:
            experts = jax.eval_shape(lambda e: split_columns(e, self.column_parts), experts)
        if self.experts_dtype:
            experts = abstract_quantized(experts, self.experts_dtype)
        wants = self.footprint(params, experts, mesh.shape[AXIS])
        offload = self.offload(wants)
        replicated, per_rank = device_sharding(mesh), device_sharding(mesh, P(AXIS))
        params = abstract(params, replicated)
        place = host_sharding if offload else device_sharding
        experts = abstract(experts, place(mesh, EXPERT_SPEC))
        prediction = next_gate(params, cfg) if offload and self.prefetch_lanes else None
        programs = make_programs(
            experts, cfg, mesh, capacity=self.capacity, offload=offload, prediction=prediction
        )
        predictor = prediction.params if prediction else None
        session = jax.eval_shape(
            lambda p: programs.start(p, batch=self.batch, seed=0, temperature=0.0), predictor
        )
        session = abstract(session, replicated).replace(offload=abstract(session.offload, per_rank))
        tails = {leaf.shape[2:] for leaf in jax.tree.leaves(experts)}
        wanted = min(self.batch * cfg.moe.router.top_k, local_experts)
        rows, slots = cfg.num_moe_layers * local_experts, offload.num_slots if offload else 0
        budget = wants.fixed_bytes + slots * wants.expert_bytes
        return Built(
            fn=programs.step,
            abstract_args=(params, experts, predictor, session),
            prefetch_scope="offload_prefetch",
            compute_scope="moe_last_wave",
            demand_scope="moe_waves",
            cache_shapes=tuple((slots, *tail) for tail in tails if slots),
            host_shapes=tuple((rows, *tail) for tail in tails)
            + tuple((cfg.num_moe_layers, local_experts, *tail) for tail in tails),
            device_budget=budget if offload else None,
            layers=cfg.num_moe_layers,
            wanted_bytes=cfg.num_moe_layers * wanted * expert_bytes(experts) if offload else 0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadedDecode(DecodeStep):
    """The step of an OLMoE-like model (arXiv 2409.02060), at half its width and half its depth."""

    d_model: int = 1024
    d_ff: int = 512
    num_layers: int = 8
    num_experts: int = 64
    top_k: int = 8
    vocab_size: int = 50304

    def model(self) -> DecoderConfig:
        router = RouterConfig(num_experts=self.num_experts, top_k=self.top_k, renormalize=False)
        heads = max(1, self.d_model // 128)
        return moe_decoder(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=128,
            moe=MoEConfig(d_ff=self.d_ff, router=router),
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointDecode(DecodeStep):
    """The step of a published model, from the config.json of its checkpoint alone."""

    config: str = "configs/hf/qwen3_30b_a3b.json"
    device_budget: str = "12GiB"
    workspace_mib: int = 256

    def model(self) -> DecoderConfig:
        path = pathlib.Path(self.config)
        values = read_json(path)
        architecture = find_architecture(values, path)
        return dataclasses.replace(architecture.read_config(Fields(values)), dtype=self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLayers:
    """The smallest offloaded program: a scan over dense layers that live in host memory.

    The weights of layer l + 1 land in a carried buffer while layer l computes.
    """

    d_model: int = 1024
    d_ff: int = 4096
    num_layers: int = 8
    batch: int = 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    expert_axis: int = 1

    def build(self, mesh: Mesh) -> Built:
        """A plain function of (host weights, activations)."""
        _check_tiles(d_model=self.d_model, d_ff=self.d_ff)
        dtype = jnp.dtype(self.dtype)
        weights = jax.eval_shape(
            lambda key: init_experts(
                key, (self.num_layers,), self.d_model, self.d_ff, out_scale=1.0, dtype=dtype
            ),
            jax.random.key(0),
        )
        x = jax.ShapeDtypeStruct((self.batch, self.d_model), dtype)
        return Built(
            fn=stream_layers,
            abstract_args=(
                abstract(weights, host_sharding(mesh)),
                abstract(x, device_sharding(mesh)),
            ),
            prefetch_scope="stream_fetch",
            compute_scope="stream_compute",
            demand_scope=None,
            cache_shapes=(),
            host_shapes=tuple({leaf.shape for leaf in jax.tree.leaves(weights)}),
            device_budget=None,
        )


def stream_layers(store: GatedWeights, x: jax.Array) -> jax.Array:
    """x [B, D] through a residual gated MLP per row of the host `store` [L, ...].

    Three weight buffers: two slots that are read in turn, and the landing. With the landing read
    directly (a carry of one buffer), libtpu 0.0.42 fetches after the computation, into the same
    buffer, and nothing overlaps.
    """
    num_layers = store.w_gate.shape[0]
    slots = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape[1:]), leaf.dtype), store)

    def layer(carry, index):
        x, slots, landed = carry
        slots = write_row(slots, index % 2, landed)
        with jax.named_scope("stream_fetch"):
            landed = fetch_rows(store, (index + 1) % num_layers)
        with jax.named_scope("stream_compute"):
            weights = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index % 2, keepdims=False), slots
            )
            x = x + gated_mlp(weights, x)
        return (x, slots, landed), None

    landed = fetch_rows(store, jnp.int32(0))
    carry, _ = jax.lax.scan(layer, (x, slots, landed), jnp.arange(num_layers, dtype=jnp.int32))
    return carry[0]


def _planned(expert_bytes: int) -> MissCosts:
    return expert_cost(get_machine("v5e-host"), expert_bytes).miss


def _check_tiles(**dims: int) -> None:
    # XLA:TPU gives a host stack whose last axis is not a multiple of 128 a transposed layout, and
    # then fails to slice it (libtpu 0.0.42: "Only handling bitcasts with majormost dimension ...").
    for name, size in dims.items():
        check(size % 128 == 0, f"{name}={size} is not a multiple of 128, the width of a TPU tile")


PROGRAMS: dict[str, type[DecodeStep] | type[StreamingLayers]] = {
    "offloaded_decode": OffloadedDecode,
    "checkpoint_decode": CheckpointDecode,
    "streaming_layers": StreamingLayers,
}
