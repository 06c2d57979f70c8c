"""One call from a folder to a model that can be served: Hugging Face or orbax, under a budget.

model = load("folder", budget="8GiB")
engine = make_engine(model.params, model.experts, model.cfg, model.mesh,
                     capacity=model.capacity, offload=model.offload)
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.checkpoint import manager as checkpoints
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.ram import check_host_memory
from moejax.interop.hf.buffers import make_buffers, read_index
from moejax.interop.hf.load import (
    Imported,
    OpenModel,
    Progress,
    abstract_model,
    load_folder,
    open_model,
)
from moejax.interop.hf.plan import Place, group_entry, places
from moejax.interop.on_disk import keep_on_disk, load_on_disk
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.quantized import Format, is_quantized, whole_matrix
from moejax.layers.moe import MoEParams
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.experts import split_experts, stacking_copies, without_experts
from moejax.models.footprint import host_bytes, plan_offload
from moejax.models.restore import ExpertMemory, read_model_config, restore_params
from moejax.offload.budget import parse_budget
from moejax.offload.disk import DiskExperts
from moejax.offload.source import Store
from moejax.offload.stage import OffloadConfig

# What a checkpoint of an imported model keeps of its source, in its extra.
HF = "hf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready for `serving.make_engine`.

    Attributes:
        params: without experts, on every device of `mesh`.
        experts: [Lm, E, ...], in `pinned_host` where there is an `offload`, else on the device; or
            the folder on disk that was asked for.
        offload: the cache that the budget leaves; None without a budget.
        capacity: positions of the KV cache that the budget was solved for.
        context: positions that the model was made for, 0 where nothing says it.
    """

    cfg: DecoderConfig
    params: DecoderParams
    experts: Store
    mesh: Mesh
    offload: OffloadConfig | None
    capacity: int
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of which is known what model it holds; no weights have been read.

    Attributes:
        context: positions that the model was made for, 0 where nothing says it.
        hf: what was read of a Hugging Face folder; None for checkpoints of moejax.
        step, kept: which checkpoint of moejax it is, and what that keeps of a Hugging Face folder.
    """

    path: pathlib.Path
    cfg: DecoderConfig
    context: int
    hf: OpenModel | None = None
    step: int | None = None
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_source(path: str | pathlib.Path, *, dtype: str | None = None) -> Source:
    """The model in a folder of either kind, `dtype` as in `load`; reads no weights."""
    folder = pathlib.Path(path)
    if _is_hf(folder):
        hf = open_model(folder, dtype=dtype)
        return Source(path=folder, cfg=hf.cfg, context=hf.context, hf=hf)
    with checkpoints.open_manager(folder, read_only=True) as manager:
        step = checkpoints.latest_step(manager)
        cfg, extra = read_model_config(manager, step)
    check(
        dtype is None or jnp.dtype(dtype) == cfg.jnp_dtype,
        f"{folder} holds {cfg.dtype}; dtype={dtype} would convert it",
    )
    kept = extra.get(HF, {})
    return Source(path=folder, cfg=cfg, context=kept.get("context", 0), step=step, kept=kept)


def load(
    source: str | pathlib.Path | Source,
    *,
    mesh: Mesh | None = None,
    budget: str | None = None,
    dtype: str | None = None,
    experts_dtype: Format | None = None,
    batch: int = 1,
    capacity: int | None = None,
    lanes: int = 0,
    predictor_bytes: int = 0,
    experts_on_disk: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model in a folder: config.json and safetensors, or checkpoints of moejax.

    Args:
        source: the folder, or what `open_source` made of it.
        mesh: None for the first device alone.
        budget: total device bytes, such as `8GiB`, or the share of the experts, such as `25%`;
            None keeps all experts on the device.
        dtype: `float32` or `bfloat16`; None for that of the checkpoint, and for a `Source`.
        experts_dtype: `int8`, `int4` or `fp8` quantises the routed experts as they are read, and
            the budget counts what they are then: outputs are no longer those of the full weights.
        batch, capacity: sequences and positions that the budget must hold; None for 1024
            positions, or the model's context where that is shorter.
        lanes: experts fetched ahead per layer; wants a prediction when the engine is made.
        predictor_bytes: what that prediction adds to the model on the device; the budget holds it.
        experts_on_disk: a folder that the experts are served from, for models larger than host
            memory; wants a budget. What the folder does not have yet is written first; of a Hugging
            Face folder without holding it. See `interop.on_disk`.
        progress: called with bytes done and in all.

    Raises `InputError` for a wrong or damaged checkpoint, a capacity past the model's context and
    a budget that is too small, with the smallest one, and for too little host memory, with how much
    is missing.
    """
    wanted = None if budget is None else parse_budget(budget)
    check(wanted is not None or experts_on_disk is None, "experts on disk want a device budget")
    check(batch >= 1, f"batch={batch} must be at least 1")
    check(capacity is None or capacity >= 1, f"capacity={capacity} must be at least 1")
    mesh = make_mesh() if mesh is None else mesh
    memory: ExpertMemory = "device" if wanted is None else "pinned_host"
    source = _opened(source, dtype)
    cfg, context = source.cfg, source.context
    capacity = capacity or min(1024, context or 1024)
    check(
        not context or capacity <= context,
        f"{capacity} positions exceed the {context} of the model's context",
    )
    # Before the weights: reading them may take minutes.
    abstract = abstract_model(cfg, mesh=mesh, expert_memory=memory, experts_dtype=experts_dtype)
    room: Any = dict(batch=batch, capacity=capacity, lanes=lanes, predictor_bytes=predictor_bytes)
    offload = plan_offload(wanted, cfg, *abstract, mesh, **room)
    if experts_on_disk is None:
        needs = host_bytes(*abstract, mesh, in_host=wanted is not None)
        check_host_memory(needs, f"the weights of {source.path}")
    how: Any = dict(mesh=mesh, experts_dtype=experts_dtype, progress=progress)
    if experts_on_disk is None:
        found = read_model(source, expert_memory=memory, **how)
        params, experts = found.params, found.experts
    else:
        params, experts = _read_to_disk(source, pathlib.Path(experts_on_disk), **how)
    return LoadedModel(
        cfg=cfg,
        params=params,
        experts=experts,
        mesh=mesh,
        offload=offload,
        capacity=capacity,
        context=context,
    )


def _read_to_disk(
    source: Source, folder: pathlib.Path, *, mesh: Mesh, experts_dtype: Format | None, progress
) -> tuple[DecoderParams, DiskExperts]:
    """The weights that are no experts, and the experts in `folder`.

    A checkpoint of moejax is restored whole before.
    """
    if source.hf is None:
        found = _restore(source, mesh, "pinned_host", experts_dtype)
        return found.params, keep_on_disk(found, folder)
    return load_on_disk(
        source.hf, folder, mesh=mesh, experts_dtype=experts_dtype, progress=progress
    )


def _opened(source: str | pathlib.Path | Source, dtype: str | None) -> Source:
    if not isinstance(source, Source):
        return open_source(source, dtype=dtype)
    check(dtype is None, f"dtype={dtype} of {source.path}, which was opened as {source.cfg.dtype}")
    return source


def _is_hf(folder: pathlib.Path) -> bool:
    """Whether it is a folder of Hugging Face, not of checkpoints; `InputError` if neither."""
    check(folder.is_dir(), f"model folder {folder} does not exist")
    if (folder / "config.json").exists():
        return True
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    check(bool(steps), f"{folder} has neither a config.json nor checkpoints of moejax")
    return False


def read_model(
    source: str | pathlib.Path | Source,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    experts_dtype: Format | None = None,
    expert_memory: ExpertMemory = "pinned_host",
    progress: Progress | None = None,
) -> Imported:
    """A model of either kind of folder, and what is needed to write it as the other.

    A model whose experts are quantised (`experts_dtype`, see `load`) cannot be written.
    """
    source = _opened(source, dtype)
    if source.hf is None:
        return _restore(source, mesh, expert_memory, experts_dtype)
    return load_folder(
        source.hf,
        mesh=mesh,
        experts_dtype=experts_dtype,
        expert_memory=expert_memory,
        progress=progress,
    )


def _restore(
    source: Source, mesh: Mesh, expert_memory: ExpertMemory, experts_dtype: Format | None
) -> Imported:
    """The checkpoint of moejax that `source` is."""
    params, cfg = restore_params(
        source.path, source.cfg, mesh=mesh, expert_memory=expert_memory, step=source.step
    )
    abstract = abstract_model(
        cfg, mesh=mesh, expert_memory=expert_memory, experts_dtype=experts_dtype
    )[1]
    arrays = len(jax.tree.leaves(params))
    dense, experts = _split(params, cfg, abstract)
    return Imported(
        cfg=cfg,
        params=dense,
        experts=experts,
        hf_config=source.kept.get("config", {}),
        stored_dtypes=source.kept.get("stored_dtypes", {}),
        context=source.context,
        tensors_read=arrays,
    )


def _split(
    params: DecoderParams, cfg: DecoderConfig, abstract: GatedWeights
) -> tuple[DecoderParams, GatedWeights]:
    """`split_experts` into what `abstract` says: stacked on the host, and quantised, if need be.

    Consumes the experts of `params`: each array is freed once it has been copied.
    """
    if not stacking_copies(cfg) and not is_quantized(abstract):
        return split_experts(params, cfg)
    at = [place for place in places(cfg) if place.moe_layer is not None]
    sources = [jax.tree.leaves(_experts_at(params, place)) for place in at]
    named = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=whole_matrix)
    leaves = []
    for i, (path, leaf) in enumerate(named):
        buffers = make_buffers("experts" + jax.tree_util.keystr(path), leaf)
        for layer, (place, arrays) in enumerate(zip(at, sources, strict=True)):
            for e in range(leaf.shape[1]):
                buffers.put((layer, e), read_index(arrays[i], (*place.index, e)))
        leaves.append(buffers.finish())
        for array in {id(arrays[i]): arrays[i] for arrays in sources}.values():
            array.delete()
    return without_experts(params), jax.tree.unflatten(
        jax.tree.structure(abstract, is_leaf=whole_matrix), leaves
    )


def _experts_at(params: DecoderParams, place: Place) -> GatedWeights:
    """The stacked experts of the group that `place` is in."""
    mlp = group_entry(params, place).mlp
    assert isinstance(mlp, MoEParams) and mlp.experts is not None
    return mlp.experts
