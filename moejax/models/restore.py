"""Restores a decoder's weights to the devices of a mesh, its experts straight into host memory.

Checkpoints hold experts in logical order [L, E, D, F], so any size of the `expert` axis can restore
them; the model's config is stored beside the weights.
"""

import pathlib
from functools import partial
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import manager as checkpoints
from moejax.checkpoint.config_json import difference, from_json
from moejax.core.errors import check
from moejax.core.memory import device_sharding, host_sharding
from moejax.core.mesh import check_divisible
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, init_decoder

ExpertMemory = Literal["pinned_host", "device"]


def restore_params(
    path: str | pathlib.Path,
    cfg: DecoderConfig | None = None,
    *,
    mesh: Mesh,
    expert_memory: ExpertMemory = "pinned_host",
    step: int | None = None,
) -> tuple[DecoderParams, DecoderConfig]:
    """Weights of the newest (or of the given) checkpoint in folder `path`, and their config.

    Experts are sharded over the `expert` axis and land in `expert_memory` without passing through
    device memory; everything else is replicated on the devices. With `cfg` the checkpoint must be
    of that very model. Raises `InputError`, in one line, for a missing, foreign or damaged
    checkpoint.
    """
    with checkpoints.open_manager(path, read_only=True) as manager:
        step = checkpoints.latest_step(manager) if step is None else step
        stored, _ = read_model_config(manager, step)
        check(
            cfg is None or stored == cfg,
            f"checkpoint {manager.directory / str(step)} is of another model: "
            f"{difference(stored, cfg or stored)}",
        )
        abstract = abstract_params(stored, mesh=mesh, expert_memory=expert_memory)
        return checkpoints.restore(manager, step, {"params": abstract})["params"], stored


def read_model_config(
    manager: ocp.CheckpointManager, step: int
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The config of the decoder that was saved at `step`, and all that was saved beside it."""
    extra, where = (
        checkpoints.read_extra(manager, step),
        f"checkpoint {manager.directory / str(step)}",
    )
    check("model" in extra, f"{where} is not a decoder's: its extra has no 'model'")
    return from_json(DecoderConfig, extra["model"], f"{where}: model"), extra


def abstract_params(
    cfg: DecoderConfig, *, mesh: Mesh, expert_memory: ExpertMemory
) -> DecoderParams:
    """Shapes, dtypes and shardings of a decoder's weights as a tree of `ShapeDtypeStruct`s."""
    for layer in cfg.layers:
        if layer.moe:
            check_divisible(layer.moe.num_experts, mesh)
    place = {"pinned_host": host_sharding, "device": device_sharding}[expert_memory]

    def struct(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = device_sharding(mesh)
        if jax.tree_util.GetAttrKey("experts") in path:
            # [L, E, ...], in a cycle [R, L, E, ...]: the axes of layers stay whole.
            layers = sum(isinstance(key, jax.tree_util.SequenceKey) for key in path)
            sharding = place(mesh, P(*[None] * layers, "expert"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # `eval_shape` loses memory kinds, so they are attached to its result.
    shapes = jax.eval_shape(partial(init_decoder, cfg=cfg), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(struct, shapes)
