"""A decoder's compiled programs: prefill and one step per token, resident or offloaded.

Everything runs inside one `shard_map` over the mesh: dense weights and the batch are replicated,
experts are sharded over the `expert` axis, in device or host memory or on disk, and every rank has
its own slot cache. The session is donated from call to call, so caches are updated in place.

Axis letters:
    B  batch    S  prompt positions    L  MoE layers    R  ranks
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moejax.experts.stage import Stage, stacked
from moejax.layers.attention import KVCache
from moejax.models.config import DecoderConfig
from moejax.models.decoder import forward, init_cache
from moejax.offload.columns import by_columns, score_columns
from moejax.offload.disk import DiskExperts
from moejax.offload.prefetch import Scorer
from moejax.offload.preload import preload
from moejax.offload.source import Store, shapes_of, source_of
from moejax.offload.stage import OffloadConfig, OffloadState, init_state, offloaded
from moejax.offload.store import EXPERT_SPEC, check_platform
from moejax.serving.prediction import Prediction, begin_token, see_prompt
from moejax.serving.sampling import next_token

AXIS = "expert"
# A tree of specs has the class of the tree it describes.
_SESSION_SPECS: dict[str, Any] = dict(
    kv=P(), token=P(), key=P(), temperature=P(), top_p=P(), offload=P(AXIS)
)


@struct.dataclass(kw_only=True)
class Session:
    """Everything that changes from token to token. Donated to every call."""

    kv: KVCache
    token: jax.Array  # int32 [B], the newest token, not yet in the KV cache
    key: jax.Array  # for sampling
    temperature: jax.Array  # float32 [], 0 decodes greedily
    top_p: jax.Array  # float32 [], 1 samples from all tokens
    offload: OffloadState | None  # leading axis R on every leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The jitted functions of an engine; sessions are donated."""

    start: Callable[..., Session]
    prefill: Any  # jitted: (params, experts, session, tokens, mask) -> session, token, metrics
    step: Any  # jitted: (params, experts, predictor, session) -> session, token, metrics
    preload: Callable[..., Session]


def make_programs(
    experts: Store,
    cfg: DecoderConfig,
    mesh: Mesh,
    *,
    capacity: int,
    offload: OffloadConfig | None,
    prediction: Prediction | None,
) -> Programs:
    """The jitted functions alone; `experts` may be abstract, for ahead-of-time compilation."""
    shapes = shapes_of(experts)
    if offload is not None and not isinstance(experts, DiskExperts):
        check_platform(shapes, mesh.devices.flat[0].platform)
    body = _Program(cfg, offload, prediction)
    session: Any = Session(**_SESSION_SPECS)
    step = jax.shard_map(
        body.step,
        mesh=mesh,
        in_specs=(P(), EXPERT_SPEC, P(), session),
        out_specs=(session, P(), P()),
    )
    fill = jax.shard_map(
        body.preload, mesh=mesh, in_specs=(EXPERT_SPEC, session, P(AXIS)), out_specs=session
    )
    start = partial(_start, shapes, cfg, mesh, capacity, offload, prediction)
    return Programs(
        start=jax.jit(
            start,
            static_argnames="batch",
            out_shardings=jax.tree.map(partial(jax.NamedSharding, mesh), session),
        ),
        prefill=_jit_prefill(cfg, mesh, offload),
        step=jax.jit(step, donate_argnums=3),
        preload=jax.jit(fill, donate_argnums=1),
    )


@lru_cache(maxsize=64)
def _jit_prefill(cfg: DecoderConfig, mesh: Mesh, offload: OffloadConfig | None):
    """The prefill program. Engines that differ in their prediction share it: it takes no part."""
    session: Any = Session(**_SESSION_SPECS)
    prefill = jax.shard_map(
        _Program(cfg, offload, None).prefill,
        mesh=mesh,
        in_specs=(P(), EXPERT_SPEC, session, P(), P()),
        out_specs=(session, P(), P()),
    )
    return jax.jit(prefill, donate_argnums=2)


def _start(
    shapes,
    cfg,
    mesh,
    capacity,
    offload,
    prediction,
    predictor,
    *,
    batch,
    seed,
    temperature,
    top_p=1.0,
):
    state, ranks = None, mesh.shape[AXIS]
    if offload is not None:
        local = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (leaf.shape[0], leaf.shape[1] // ranks, *leaf.shape[2:]), leaf.dtype
            ),
            shapes,
        )
        seen = prediction.init(predictor, batch) if prediction else None
        state = init_state(local, offload, predictor=seen)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * ranks), state)
    return Session(
        kv=init_cache(cfg, batch, capacity, as_bits=mesh.devices.flat[0].platform == "cpu"),
        token=jnp.zeros((batch,), jnp.int32),
        key=jax.random.key(seed),
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        offload=state,
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """The per-rank bodies of the two programs."""

    cfg: DecoderConfig
    offload: OffloadConfig | None
    prediction: Prediction | None

    def prefill(self, params, experts, session, tokens, mask):
        """Runs the prompts; nothing is predicted, as a prompt wants nearly every expert."""
        # Logits of a whole prompt would be its largest array: positions times vocabulary.
        last = jnp.sum(mask, axis=1, dtype=jnp.int32) - 1
        stage = self._stage(experts, None)
        out, session = self._forward(params, stage, session, tokens, mask, last)
        if session.offload is not None:
            kept = _of_rank(session.offload.predictor)
            seen = see_prompt(kept, out.record.topk_idx, tokens, mask)
            session = _with_offload(session, predictor=_as_rank(seen))
        return self._emit(session, out.logits[:, 0], out.metrics)

    def step(self, params, experts, predictor, session):
        scorer = None
        if self.prediction:
            scorer = self.prediction.scorer(predictor)
            begun = begin_token(_of_rank(session.offload.predictor), session.token)
            session = _with_offload(session, predictor=_as_rank(begun))
        stage = self._stage(experts, scorer)
        out, session = self._forward(params, stage, session, session.token[:, None], None)
        return self._emit(session, out.logits[:, 0], out.metrics)

    def preload(self, experts, session, granules):
        state = session.offload
        cache = preload(_of_rank(state.cache), source_of(experts, AXIS), granules[0])
        return _with_offload(session, cache=_as_rank(cache))

    def _stage(self, experts: Any, scorer: Scorer | None) -> Stage:
        if self.offload is None:
            return stacked(experts, axis=AXIS)
        parts = self.offload.column_parts
        scorer = score_columns(scorer, parts)
        return by_columns(offloaded(experts, self.offload, scorer=scorer, axis=AXIS), parts)

    def _forward(self, params, stage, session, tokens, mask, logits_at=None):
        out = forward(
            params,
            tokens,
            self.cfg,
            cache=session.kv,
            mask=mask,
            logits_at=logits_at,
            stage=stage,
            stage_state=_of_rank(session.offload),
        )
        return out, dataclasses.replace(session, kv=out.cache, offload=_as_rank(out.stage_state))

    def _emit(self, session, logits, metrics):
        key, draw = jax.random.split(session.key)
        token = next_token(draw, logits, session.temperature, session.top_p)
        return dataclasses.replace(session, token=token, key=key), token, metrics


def _of_rank(tree):
    """This rank's part of a session tree: without the leading rank axis."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _as_rank(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _with_offload(session, **changes):
    """The session with fields of its offload state changed."""
    return dataclasses.replace(session, offload=dataclasses.replace(session.offload, **changes))
