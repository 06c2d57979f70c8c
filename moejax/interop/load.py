"""One call from a folder to a model that can be served: Hugging Face or orbax, under a budget.

model = load("folder", budget="8GiB")
engine = make_engine(model.params, model.experts, model.cfg, model.mesh,
                     capacity=model.capacity, offload=model.offload)
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.checkpoint import manager as checkpoints
from moejax.core.errors import InputError, check
from moejax.core.mesh import make_mesh
from moejax.interop.hf.buffers import Buffers, read_index
from moejax.interop.hf.load import Imported, Progress, abstract_model, load_folder
from moejax.interop.hf.plan import group_entry, places
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.moe import MoEParams
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.models.decoder import DecoderParams
from moejax.models.experts import split_experts, without_experts
from moejax.models.footprint import plan_offload
from moejax.models.restore import ExpertMemory, restore_params
from moejax.offload.budget import parse_budget
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_device

# What a checkpoint of an imported model keeps of its source, in its extra.
HF = "hf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for `serving.make_engine`.

    Attributes:
        params: without experts, on every device of `mesh`.
        experts: [Lm, E, ...], in `pinned_host` where there is an `offload`, else on the device.
        offload: the cache that the budget leaves; None without a budget.
        capacity: positions of the KV cache that the budget was solved for.
        context: positions that the model was made for, 0 where nothing says it.
    """

    cfg: DecoderConfig
    params: DecoderParams
    experts: GatedWeights
    mesh: Mesh
    offload: OffloadConfig | None
    capacity: int
    context: int


def load(
    path: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    budget: str | None = None,
    dtype: str | None = None,
    batch: int = 1,
    capacity: int | None = None,
    lanes: int = 0,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model in folder `path`: config.json and safetensors, or checkpoints of moejax.

    Args:
        mesh: None for the first device alone.
        budget: total device bytes, such as `8GiB`, or the share of the experts, such as `25%`;
            None keeps all experts on the device.
        dtype: `float32` or `bfloat16`; None for that of the checkpoint.
        batch, capacity: sequences and positions that the budget must hold; None for 1024
            positions, or the model's context where that is shorter.
        lanes: experts fetched ahead per layer; wants a prediction when the engine is made.
        progress: called with bytes done and in all.

    Raises `InputError` for a wrong or damaged checkpoint, a capacity past the model's context and
    a budget that is too small, with the smallest one.
    """
    wanted = None if budget is None else parse_budget(budget)
    check(batch >= 1, f"batch={batch} must be at least 1")
    check(capacity is None or capacity >= 1, f"capacity={capacity} must be at least 1")
    mesh = make_mesh() if mesh is None else mesh
    memory: ExpertMemory = "device" if wanted is None else "pinned_host"
    found = read_model(path, mesh=mesh, dtype=dtype, expert_memory=memory, progress=progress)
    capacity = capacity or min(1024, found.context or 1024)
    check(
        not found.context or capacity <= found.context,
        f"{capacity} positions exceed the {found.context} of the model's context",
    )
    offload = plan_offload(
        wanted, found.cfg, found.params, found.experts, mesh,
        batch=batch, capacity=capacity, lanes=lanes,
    )  # fmt: skip
    experts = found.experts if offload else to_device(found.experts, mesh)
    return LoadedModel(
        cfg=found.cfg,
        params=found.params,
        experts=experts,
        mesh=mesh,
        offload=offload,
        capacity=capacity,
        context=found.context,
    )


def read_model(
    path: str | pathlib.Path,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    expert_memory: ExpertMemory = "pinned_host",
    progress: Progress | None = None,
) -> Imported:
    """A model of either kind of folder, and what is needed to write it as the other."""
    folder = pathlib.Path(path)
    check(folder.is_dir(), f"model folder {folder} does not exist")
    if (folder / "config.json").exists():
        return load_folder(
            folder, mesh=mesh, dtype=dtype, expert_memory=expert_memory, progress=progress
        )
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    if not steps:
        raise InputError(f"{folder} has neither a config.json nor checkpoints of moejax")
    return _restore(folder, mesh, dtype, expert_memory)


def _restore(
    folder: pathlib.Path, mesh: Mesh, dtype: str | None, expert_memory: ExpertMemory
) -> Imported:
    """The newest checkpoint of moejax; `dtype` must be that of it."""
    params, cfg = restore_params(folder, mesh=mesh, expert_memory=expert_memory)
    check(
        dtype is None or jnp.dtype(dtype) == cfg.jnp_dtype,
        f"{folder} holds {cfg.dtype}; dtype={dtype} would convert it",
    )
    with checkpoints.open_manager(folder, read_only=True) as manager:
        kept = checkpoints.read_extra(manager, checkpoints.latest_step(manager)).get(HF, {})
    dense, experts = _split(params, cfg, mesh, expert_memory)
    return Imported(
        cfg=cfg,
        params=dense,
        experts=experts,
        hf_config=kept.get("config", {}),
        stored_dtypes=kept.get("stored_dtypes", {}),
        context=kept.get("context", 0),
        tensors_read=len(jax.tree.leaves(params)),
    )


def _split(params: DecoderParams, cfg: DecoderConfig, mesh: Mesh, expert_memory: ExpertMemory):
    """`split_experts` that stacks several groups of MoE layers on the host, not on the device."""
    moe_groups = [group for group in cfg.groups if any(layer.moe for layer in group.layers)]
    if len(moe_groups) == 1 and isinstance(moe_groups[0], LayerGroup):
        return split_experts(params, cfg)
    abstract = abstract_model(cfg, mesh=mesh, expert_memory=expert_memory)[1]
    buffers = jax.tree.map(Buffers, abstract)
    layer = 0
    for place in places(cfg):
        if place.moe_layer is None:
            continue
        mlp = group_entry(params, place).mlp
        assert isinstance(mlp, MoEParams)
        for buffer, leaf in zip(
            jax.tree.leaves(buffers), jax.tree.leaves(mlp.experts), strict=True
        ):
            for e in range(leaf.shape[len(place.index)]):
                buffer.put((layer, e), read_index(leaf, (*place.index, e)))
        layer += 1
    stack = jax.tree.map(lambda buffer: buffer.finish(), buffers)
    return without_experts(params), stack
