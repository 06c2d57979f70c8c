"""All layers' experts as one stack, apart from the other weights: the form that serving wants.

Axis letters:
    Lm  MoE layers    E  experts    R  repeats of a cycle
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import check
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.moe import MoEParams
from moejax.models.config import AnyGroup, DecoderConfig, LayerGroup
from moejax.models.params import DecoderParams, GroupParams, LayerParams


def split_experts(params: DecoderParams, cfg: DecoderConfig) -> tuple[DecoderParams, GatedWeights]:
    """The parameters without routed experts, and the experts [Lm, E, ...] of all MoE layers.

    Cost: none where the MoE layers are one group; a copy of the experts where they are several.
    """
    experts = stack_moe(params, cfg, lambda moe: moe.experts)
    return without_experts(params), experts


def without_experts(params: DecoderParams) -> DecoderParams:
    """The parameters without routed experts."""
    bare = jax.tree.map(_without_experts, params.groups, is_leaf=_is_layers)
    return dataclasses.replace(params, groups=bare)


def join_experts(params: DecoderParams, experts: GatedWeights, cfg: DecoderConfig) -> DecoderParams:
    """The inverse of `split_experts`."""
    groups, seen = [], 0
    for layers, group in zip(params.groups, cfg.groups, strict=True):
        count = sum(layer.moe is not None for layer in group.layers)
        whole = count == experts.w_gate.shape[0]
        mine = experts if whole else jax.tree.map(lambda w, s=seen, c=count: w[s : s + c], experts)
        groups.append(_join(layers, group, mine))
        seen += count
    return dataclasses.replace(params, groups=tuple(groups))


def stack_moe(params: DecoderParams, cfg: DecoderConfig, get: Callable[[MoEParams], Any]) -> Any:
    """`get` of every MoE layer's weights, stacked in layer order to a leading [Lm]."""
    groups = zip(params.groups, cfg.groups, strict=True)
    stacks = [s for s in (_stack(layers, group, get) for layers, group in groups) if s is not None]
    check(bool(stacks), "a decoder without MoE layers has no experts")
    return stacks[0] if len(stacks) == 1 else jax.tree.map(_concatenate, *stacks)


def stacking_copies(cfg: DecoderConfig) -> bool:
    """Whether `stack_moe` copies: the MoE layers are several groups, or a part of a cycle."""
    moe = [group for group in cfg.groups if any(layer.moe for layer in group.layers)]
    return len(moe) != 1 or not isinstance(moe[0], LayerGroup)


def _stack(layers: GroupParams, group: AnyGroup, get: Callable[[MoEParams], Any]) -> Any:
    """[layers of the group, ...], or None where they are not MoE layers."""
    if isinstance(layers, LayerParams):
        return get(layers.mlp) if isinstance(layers.mlp, MoEParams) else None
    assert not isinstance(group, LayerGroup)
    parts = [get(part.mlp) for part in layers if isinstance(part.mlp, MoEParams)]
    if not parts:
        return None

    def flat(*leaves: jax.Array) -> jax.Array:
        joined = leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)  # [R, n, ...]
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(flat, *parts)


def _join(layers: GroupParams, group: AnyGroup, experts: GatedWeights) -> GroupParams:
    if isinstance(layers, LayerParams):
        return _with_experts(layers, experts)
    assert not isinstance(group, LayerGroup)
    folded = jax.tree.map(lambda w: w.reshape(group.repeats, -1, *w.shape[1:]), experts)
    parts, seen = [], 0
    for part, inner in zip(layers, group.groups, strict=True):
        count = inner.num_layers if inner.moe else 0
        mine = jax.tree.map(lambda w, s=seen, c=count: w[:, s : s + c], folded)
        parts.append(_with_experts(part, mine))
        seen += count
    return tuple(parts)


def _is_layers(node: Any) -> bool:
    return isinstance(node, LayerParams)


def _without_experts(layers: LayerParams) -> LayerParams:
    if not isinstance(layers.mlp, MoEParams):
        return layers
    return dataclasses.replace(layers, mlp=dataclasses.replace(layers.mlp, experts=None))


def _with_experts(layers: LayerParams, experts: GatedWeights) -> LayerParams:
    if not isinstance(layers.mlp, MoEParams):
        return layers
    return dataclasses.replace(layers, mlp=dataclasses.replace(layers.mlp, experts=experts))


def _concatenate(*leaves: jax.Array) -> jax.Array:
    return jnp.concatenate(leaves)
