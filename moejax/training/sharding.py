"""Where a training state lives on a mesh, and the loss that every rank computes its part of.

Tokens are split over `data` and `expert`, experts over `expert` (or both: `cfg.dispatch`), heads
and hidden dims over `model` (`moejax.layers.parallel`). With `cfg.fully_sharded` all weights are
also split along the model dim: dense ones over `data` and `expert`, experts over `data`. A layer's
are gathered when it starts, again in the backward pass, and its gradients are reduce-scattered
(ZeRO-3, arXiv 1910.02054). The optimizer state lies where its weights do.

Axis letters:
    B  batch    S  positions    L  layers    V  vocabulary    D  model dim    E  experts
    H  heads or KV heads    A  head dim    F  hidden dim
"""

import math
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError, check
from moejax.layers.parallel import Parallel
from moejax.models.config import Cycle, DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.training.config import TrainConfig
from moejax.training.loss import LossMetrics, train_loss

TOKEN_AXES = ("data", "expert")
# Dims of a weight; layers come before, experts between.
DIMS = {
    "embed": "VD",
    "w_out": "DV",
    "final_norm": "D",
    "attention_norm": "D",
    "mlp_norm": "D",
    "w_q": "DHA",
    "w_k": "DHA",
    "w_v": "DHA",
    "w_o": "HAD",
    "w_gate": "DF",
    "w_up": "DF",
    "w_down": "FD",
    "w_router": "DE",
}


def check_mesh(mesh: Mesh, model: DecoderConfig, cfg: TrainConfig) -> None:
    """Raises `InputError` where something does not divide over the mesh."""
    experts, axes = model.moe.num_experts, cfg.dispatch.axes
    expert_ranks = math.prod(mesh.shape[axis] for axis in axes)
    check(
        experts % expert_ranks == 0,
        f"num_experts={experts} is not divisible by {' * '.join(axes)} axis size {expert_ranks}",
    )
    cfg.dispatch.stage(experts, model.moe.router.gate, TOKEN_AXES)
    ranks, model_ranks = mesh.shape["data"] * mesh.shape["expert"], mesh.shape["model"]
    check(
        cfg.batch_size % ranks == 0,
        f"batch_size={cfg.batch_size} is not divisible by data * expert = {ranks} ranks",
    )
    sizes = {"num_heads": model.attention.num_heads, "num_kv_heads": model.attention.num_kv_heads}
    for group in model.groups:
        if isinstance(group, Cycle):
            raise InputError("training wants groups of equal layers, this decoder has a cycle")
        sizes["d_ff"] = group.moe.d_ff if group.moe else group.d_ff
        sizes["shared_d_ff"] = group.moe.shared_d_ff if group.moe else 0
        for name, size in sizes.items():
            check(size % model_ranks == 0, f"{name}={size} is not divisible by model={model_ranks}")
    tokens = cfg.batch_size // ranks * cfg.seq_len
    check(
        tokens % cfg.dispatch.num_chunks == 0,
        f"{tokens} tokens of a rank are not divisible by num_chunks={cfg.dispatch.num_chunks}",
    )
    if cfg.fully_sharded:
        check(
            model.d_model % ranks == 0,
            f"d_model={model.d_model} is not divisible by data * expert = {ranks} ranks, "
            f"fully_sharded wants it",
        )


def state_specs(state: Any, mesh: Mesh, cfg: TrainConfig) -> Any:
    """A `PartitionSpec` per leaf of a training state, of parameters or gradients.

    Leaves with other names than `DIMS` has are replicated.
    """

    def spec(path: tuple, leaf: Any) -> P:
        return _shortest(_spec(path, leaf, cfg), mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def _spec(path: tuple, leaf: Any, cfg: TrainConfig) -> P:
    dims, axes = _dims(path) if leaf.ndim else "", _axes(path, cfg)
    assert len(dims) in (0, leaf.ndim), (jax.tree_util.keystr(path), leaf.shape)
    return P(*(axes.get(dim) for dim in dims))


def _dims(path: tuple) -> str:
    """Letters of a leaf's dims, none for a leaf that is replicated."""
    names = _names(path)
    known = DIMS.get(names[-1], "")
    return known and "L" * ("groups" in names) + "E" * ("experts" in names) + known


def _axes(path: tuple, cfg: TrainConfig) -> dict[str, Any]:
    """Mesh axes that each dim is split over."""
    experts = cfg.dispatch.axes if "experts" in _names(path) else ()
    rest = tuple(axis for axis in TOKEN_AXES if axis not in experts)
    return {"H": "model", "F": "model", "E": experts, "D": rest if cfg.fully_sharded else ()}


def _names(path: tuple) -> list[str]:
    return [getattr(key, "name", "") for key in path]


def state_shardings(state: Any, mesh: Mesh, cfg: TrainConfig) -> Any:
    """A `NamedSharding` per leaf, experts in the memory that `cfg` says."""

    def sharding(path: tuple, spec: P) -> NamedSharding:
        kind = cfg.experts_memory if "experts" in _names(path) else "device"
        return NamedSharding(mesh, spec, memory_kind=kind)

    specs = state_specs(state, mesh, cfg)
    return jax.tree_util.tree_map_with_path(
        sharding, specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def _shortest(spec: P, mesh: Mesh) -> P:
    """The same placement as compiled programs spell it; another spelling compiles them again."""
    short: list[Any] = []
    for axis in spec:
        names = (axis,) if isinstance(axis, str) else axis or ()
        split = tuple(name for name in names if mesh.shape[name] > 1)
        short.append(split[0] if len(split) == 1 else split or None)
    while short and short[-1] is None:
        short.pop()
    return P(*short)


def unshard(params: Any, cfg: TrainConfig) -> Any:
    """Weights of one layer, or of the model without its layers, whole over the token axes.

    For fully sharded ones, inside `shard_map`. Cost: an all-gather per leaf; its transpose is a
    reduce-scatter.
    """

    def whole(path: tuple, leaf: jax.Array) -> jax.Array:
        axes, dims = _axes(path, cfg)["D"], _dims(path)
        if not axes or "D" not in dims:
            return leaf
        leaf = jax.lax.all_gather(leaf, axes, axis=dims.index("D"), tiled=True)
        return checkpoint_name(leaf, "unsharded")

    with jax.named_scope("unshard"):
        return jax.tree_util.tree_map_with_path(whole, params)


def sharded_loss(
    params: DecoderParams, tokens: jax.Array, model: DecoderConfig, cfg: TrainConfig, mesh: Mesh
) -> tuple[jax.Array, LossMetrics]:
    """`train_loss` of tokens int32 [B, S + 1] on a mesh: the same value on every mesh to rounding.

    Its gradient has the shardings of the parameters. Cost per layer: what the dispatch moves, two
    all-reduces of activations over `model` in each direction, and what `unshard` moves, twice; per
    step: an all-reduce of the gradients that are not fully sharded.
    """
    whole = {"unshard": partial(unshard, cfg=cfg)} if cfg.fully_sharded else {}
    router = model.moe.router
    body = partial(
        train_loss,
        model=model,
        cfg=cfg,
        stage=cfg.dispatch.stage(model.moe.num_experts, router.gate, TOKEN_AXES),
        parallel=Parallel(token_axes=TOKEN_AXES, model_axis="model", **whole),
    )
    if cfg.fully_sharded:
        # Whole weights of all layers, kept for the backward pass, would undo the saving.
        policy = jax.checkpoint_policies.save_anything_except_these_names("unsharded")
        body = jax.checkpoint(body, policy=policy)
    if AxisType.Explicit in mesh.axis_types:
        tokens = jax.reshard(tokens, NamedSharding(mesh, P(TOKEN_AXES)))
    specs = (state_specs(params, mesh, cfg), P(TOKEN_AXES))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())(params, tokens)
