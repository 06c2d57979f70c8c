"""A decoder as two compiled programs, prefill and one step per token, resident or offloaded.

Everything runs inside one `shard_map` over the mesh: dense weights and the batch are replicated,
experts are sharded over the `expert` axis, in device or host memory, and every rank has its own
slot cache. The session is donated from call to call, so caches are updated in place.

Axis letters:
    B  batch    S  prompt positions    V  vocabulary    L  MoE layers    R  ranks
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics
from moejax.experts.stage import Stage, stacked
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.layers.attention import KVCache
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams, forward, init_cache
from moejax.offload.prefetch import Scorer
from moejax.offload.preload import preload
from moejax.offload.stage import OffloadConfig, OffloadState, init_state, offloaded
from moejax.offload.store import EXPERT_SPEC

AXIS = "expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predictor as the engine uses it: scores, its carry, and what a new token does to it."""

    scorer: Scorer
    init: Callable[[int], Any]  # batch -> state
    begin_token: Callable[[Any, jax.Array], Any]  # (state, token [B]) -> state


@struct.dataclass(kw_only=True)
class Session:
    """Everything that changes from token to token. Donated to every call."""

    kv: KVCache
    token: jax.Array  # int32 [B], the newest token, not yet in the KV cache
    key: jax.Array  # for sampling
    offload: OffloadState | None  # leading axis R on every leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Compiled programs and the arrays they read. Build with `make_engine`."""

    cfg: DecoderConfig
    mesh: Mesh
    params: DecoderParams  # without experts
    experts: GatedWeights  # [L, E, ...], on the device or in pinned_host
    start: Callable[..., Session]
    prefill: Callable[..., tuple[Session, jax.Array, MoEMetrics]]
    step: Callable[..., tuple[Session, jax.Array, MoEMetrics]]
    preload: Callable[..., Session]


def split_experts(params: DecoderParams, cfg: DecoderConfig) -> tuple[DecoderParams, GatedWeights]:
    """The parameters without routed experts, and the experts [L, E, ...]."""
    at = [i for i, group in enumerate(cfg.groups) if group.moe]
    check(len(at) == 1, f"serving wants one group of MoE layers, this decoder has {len(at)}")
    groups = list(params.groups)
    layer = groups[at[0]]
    experts = layer.mlp.experts
    groups[at[0]] = layer.replace(mlp=layer.mlp.replace(experts=None))
    return params.replace(groups=tuple(groups)), experts


def make_engine(
    params: DecoderParams,
    experts: GatedWeights,
    cfg: DecoderConfig,
    mesh: Mesh,
    *,
    capacity: int,
    offload: OffloadConfig | None = None,
    prediction: Prediction | None = None,
    temperature: float = 0.0,
) -> Engine:
    """Builds the two programs. Nothing is compiled before the first call.

    Args:
        params, experts: see `split_experts`; with `offload` the experts live in `pinned_host`.
        capacity: positions of the KV cache; prompt and new tokens must fit.
        offload: slot cache and prefetch; None keeps all experts on the device.
        prediction: what to prefetch; wants `offload.prefetch_lanes > 0`.
        temperature: 0 decodes greedily.
    """
    lanes = offload.prefetch_lanes if offload else 0
    check(
        (prediction is None) == (lanes == 0),
        f"prefetch_lanes={lanes} and a prediction go together",
    )
    program = _Program(cfg, offload, prediction, temperature)
    specs = Session(kv=P(), token=P(), key=P(), offload=P(AXIS))
    common = dict(mesh=mesh, out_specs=(specs, P(), P()))
    prefill = jax.shard_map(program.prefill, in_specs=(P(), EXPERT_SPEC, specs, P(), P()), **common)
    step = jax.shard_map(program.step, in_specs=(P(), EXPERT_SPEC, specs), **common)
    fill = jax.shard_map(
        program.preload, mesh=mesh, in_specs=(EXPERT_SPEC, specs, P()), out_specs=specs
    )
    return Engine(
        cfg=cfg,
        mesh=mesh,
        params=params,
        experts=experts,
        start=partial(_start, experts, cfg, mesh, capacity, offload, prediction),
        prefill=jax.jit(prefill, donate_argnums=2),
        step=jax.jit(step, donate_argnums=2),
        preload=jax.jit(fill, donate_argnums=1),
    )


def _start(experts, cfg, mesh, capacity, offload, prediction, batch: int, seed: int) -> Session:
    """An empty session for `batch` sequences."""
    ranks = mesh.shape[AXIS]

    def build():
        state = None
        if offload is not None:
            local = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    (leaf.shape[0], leaf.shape[1] // ranks, *leaf.shape[2:]), leaf.dtype
                ),
                experts,
            )
            predictor = prediction.init(batch) if prediction else None
            state = init_state(local, offload, predictor=predictor)
            state = jax.tree.map(lambda leaf: jnp.stack([leaf] * ranks), state)
        return Session(
            kv=init_cache(cfg, batch, capacity),
            token=jnp.zeros((batch,), jnp.int32),
            key=jax.random.key(seed),
            offload=state,
        )

    specs = Session(kv=P(), token=P(), key=P(), offload=P(AXIS))
    shapes = jax.eval_shape(build)
    shardings = jax.tree.map(
        lambda spec, tree: jax.tree.map(lambda _: jax.NamedSharding(mesh, spec), tree),
        specs,
        shapes,
        is_leaf=lambda node: isinstance(node, P),
    )
    return jax.jit(build, out_shardings=shardings)()


@dataclasses.dataclass(frozen=True)
class _Program:
    """The per-rank bodies of the two programs."""

    cfg: DecoderConfig
    offload: OffloadConfig | None
    prediction: Prediction | None
    temperature: float

    def prefill(self, params, experts, session, tokens, mask):
        """Runs the prompts [B, S] with mask [B, S]; nothing is prefetched (all experts run)."""
        stage = self._stage(experts, scorer=None)
        out, session = self._forward(params, stage, session, tokens, mask)
        last = jnp.sum(mask, axis=1, dtype=jnp.int32) - 1
        logits = jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0]
        return self._emit(session, logits, out.metrics)

    def step(self, params, experts, session):
        """Decodes one token per sequence."""
        stage = self._stage(experts, self.prediction and self.prediction.scorer)
        if self.prediction:
            state = session.offload
            begun = self.prediction.begin_token(
                jax.tree.map(lambda leaf: leaf[0], state.predictor), session.token
            )
            begun = jax.tree.map(lambda leaf: leaf[None], begun)
            session = session.replace(offload=state.replace(predictor=begun))
        out, session = self._forward(params, stage, session, session.token[:, None], None)
        return self._emit(session, out.logits[:, 0], out.metrics)

    def preload(self, experts, session, granules):
        """Fills every rank's cache with `granules` (int32 [n], rank-local rows)."""
        state = session.offload
        cache = preload(jax.tree.map(lambda leaf: leaf[0], state.cache), experts, granules)
        cache = jax.tree.map(lambda leaf: leaf[None], cache)
        return session.replace(offload=state.replace(cache=cache))

    def _stage(self, experts: GatedWeights, scorer: Scorer | None) -> Stage:
        if self.offload is None:
            return stacked(experts, axis=AXIS)
        return offloaded(experts, self.offload, scorer=scorer, axis=AXIS)

    def _forward(self, params, stage, session, tokens, mask):
        state = jax.tree.map(lambda leaf: leaf[0], session.offload)
        out = forward(
            params, tokens, self.cfg, cache=session.kv, mask=mask, stage=stage, stage_state=state
        )
        offload = jax.tree.map(lambda leaf: leaf[None], out.stage_state)
        return out, session.replace(kv=out.cache, offload=offload)

    def _emit(self, session, logits, metrics):
        key, draw = jax.random.split(session.key)
        if self.temperature > 0:
            token = jax.random.categorical(draw, logits / self.temperature, axis=-1)
        else:
            token = jnp.argmax(logits, axis=-1)
        token = token.astype(jnp.int32)
        return session.replace(token=token, key=key), token, metrics
