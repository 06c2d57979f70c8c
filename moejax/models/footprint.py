"""What a decoder wants of a device, what a step reads, and the cache that a budget leaves.

Axis letters:
    B  batch    S  positions    D  model dim    V  vocabulary    K  experts per token
"""

import jax
from jax.sharding import Mesh

from moejax.core.errors import check
from moejax.core.memory import nbytes
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.params import DecoderParams, init_cache
from moejax.offload.budget import Footprint, solve_slots
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import expert_bytes


def footprint(
    cfg: DecoderConfig,
    params: DecoderParams,
    experts: GatedWeights,
    *,
    ranks: int,
    batch: int,
    capacity: int,
    prompt: int | None = None,
    lanes: int = 0,
    predictor_bytes: int = 0,
) -> Footprint:
    """Device bytes of one rank besides slots; weights [Lm, E, ...] may be abstract.

    Workspace is that of the longest prompt, as long as `capacity` unless `prompt` says less: rows
    sorted into the experts and back in float32, and the logits.
    """
    kv = jax.eval_shape(lambda: init_cache(cfg, batch, capacity))
    rows = batch * (capacity if prompt is None else prompt)
    sorted_bytes = 4 * rows * cfg.moe.router.top_k * cfg.d_model * 4
    return Footprint(
        dense_bytes=nbytes(params),
        kv_bytes=nbytes(kv),
        workspace_bytes=sorted_bytes + rows * cfg.vocab_size * 4,
        expert_bytes=expert_bytes(experts),
        num_layers=cfg.num_moe_layers,
        num_experts=experts.w_gate.shape[1] // ranks,
        landing_experts=lanes + 1,
        predictor_bytes=predictor_bytes,
    )


def step_read_bytes(params: DecoderParams, experts: GatedWeights, distinct: float) -> float:
    """Bytes of weights that a decode step must read: dense ones, and `distinct` experts.

    Of an embedding that is not the output projection too, a step reads a row per sequence only.
    """
    dense = nbytes(params) - (0 if params.w_out is None else nbytes(params.embed))
    return dense + distinct * expert_bytes(experts)


def host_bytes(params: DecoderParams, experts: GatedWeights, mesh: Mesh, *, in_host: bool) -> int:
    """What the weights take of the memory of this process's host: experts that are `in_host`.

    Where the devices are processors of the host it is all weights, and the experts count once.
    """
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    of_experts = nbytes(experts) * local // mesh.devices.size
    if mesh.devices.flat[0].platform == "cpu":
        return nbytes(params) * local + of_experts
    return of_experts if in_host else 0


def plan_offload(
    budget: float | int | None,
    cfg: DecoderConfig,
    params: DecoderParams,
    experts: GatedWeights,
    mesh: Mesh,
    *,
    batch: int,
    capacity: int,
    lanes: int = 0,
    predictor_bytes: int = 0,
) -> OffloadConfig | None:
    """The cache that fits `budget` (as `parse_budget` gives it); None, all experts, without one.

    `predictor_bytes` is what a prediction keeps on the device beside the model.
    Raises `InputError` that says the smallest budget when it does not suffice.
    """
    if budget is None:
        return None
    own = cfg.moe.num_experts // mesh.shape["expert"]
    check(lanes <= own, f"{lanes} prefetch lanes exceed the {own} experts of a layer and rank")
    wants = footprint(
        cfg,
        params,
        experts,
        ranks=mesh.shape["expert"],
        batch=batch,
        capacity=capacity,
        lanes=lanes,
        predictor_bytes=predictor_bytes,
    )
    slots = solve_slots(budget, wants, min_slots=cfg.num_moe_layers)
    return OffloadConfig(num_slots=slots, prefetch_lanes=lanes)
