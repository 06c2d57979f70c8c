"""Where a training state lives on a mesh, and the loss that every rank computes its part of.

Tokens are sharded over `data` and `expert`, experts over `expert`; everything else is replicated.
Tokens reach their experts by `moejax.dispatch`.

Axis letters:
    B  batch    S  positions    L  layers    E  experts
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.core.mesh import check_divisible
from moejax.dispatch.gather import gather
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.training.config import TrainConfig
from moejax.training.loss import LossMetrics, train_loss

TOKEN_AXES = ("data", "expert")


def check_mesh(mesh: Mesh, model: DecoderConfig, cfg: TrainConfig) -> None:
    """Raises `InputError` where experts or sequences do not divide over the mesh."""
    check(mesh.shape["model"] == 1, f"training over model={mesh.shape['model']} is not supported")
    check_divisible(model.moe.router.num_experts, mesh)
    ranks = mesh.shape["data"] * mesh.shape["expert"]
    check(
        cfg.batch_size % ranks == 0,
        f"batch_size={cfg.batch_size} is not divisible by data * expert = {ranks} ranks",
    )


def state_specs(state: Any) -> Any:
    """A `PartitionSpec` per leaf of a training state, of parameters or gradients."""

    def spec(path: tuple, leaf: Any) -> P:
        del leaf
        is_expert = any(getattr(key, "name", None) == "experts" for key in path)
        return P(None, "expert") if is_expert else P()

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` per leaf."""
    return jax.tree.map(
        partial(NamedSharding, mesh), state_specs(state), is_leaf=lambda leaf: isinstance(leaf, P)
    )


def sharded_loss(
    params: DecoderParams, tokens: jax.Array, model: DecoderConfig, cfg: TrainConfig, mesh: Mesh
) -> tuple[jax.Array, LossMetrics]:
    """`train_loss` of tokens int32 [B, S + 1] on a mesh: the same value on every mesh to rounding.

    Its gradient has the shardings of the parameters. Cost per layer: what the dispatch moves; per
    step: an all-reduce of the dense gradients, and of the experts' over `data`.
    """
    body = partial(
        train_loss,
        model=model,
        cfg=cfg,
        stage=gather(num_experts=model.moe.router.num_experts, token_axes=TOKEN_AXES),
        token_axes=TOKEN_AXES,
    )
    if AxisType.Explicit in mesh.axis_types:
        tokens = jax.reshard(tokens, NamedSharding(mesh, P(TOKEN_AXES)))
    specs = (state_specs(params), P(TOKEN_AXES))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())(params, tokens)
