"""A decoder that serves: its weights, its compiled programs and the checks around their calls.

Axis letters:
    B  batch    S  prompt positions    L  MoE layers    R  ranks
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.core.errors import check
from moejax.core.structs import MoEMetrics
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.experts import split_experts as split_experts
from moejax.offload.disk import DiskExperts
from moejax.offload.source import Store, shapes_of
from moejax.offload.stage import OffloadConfig
from moejax.serving.prediction import Prediction
from moejax.serving.programs import AXIS, Programs, Session, make_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Programs and the arrays they read. Build with `make_engine`."""

    cfg: DecoderConfig
    mesh: Mesh
    capacity: int
    params: DecoderParams  # without experts
    experts: Store  # [L, E, ...], on the device or in pinned_host, or a folder
    predictor: Any  # parameters of the prediction, or None
    programs: Programs

    def start(
        self, batch: int, *, seed: int = 0, temperature: float = 0.0, top_p: float = 1.0
    ) -> Session:
        """An empty session for `batch` sequences; temperature 0 decodes greedily.

        Otherwise tokens are sampled from the likeliest that make up `top_p`, see `sampling`.
        """
        check(temperature >= 0, f"temperature={temperature} must not be negative")
        check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1")
        return self.programs.start(
            self.predictor,
            batch=batch,
            seed=seed,
            temperature=float(temperature),
            top_p=float(top_p),
        )

    def prefill(
        self, session: Session, tokens: jax.Array, mask: jax.Array
    ) -> tuple[Session, jax.Array, MoEMetrics]:
        """Runs prompts int32 [B, S], mask bool [B, S] True on the left; the first new tokens.

        Every row of `mask` has a True. Costs a host round trip to check that the cache has room.
        """
        used, new = int(session.kv.length.max()), tokens.shape[1]
        check(
            used + new <= self.capacity,
            f"a prompt of {new} positions after {used} exceeds the KV capacity {self.capacity}",
        )
        check(bool(jnp.all(mask[:, 0])), "a prompt without tokens: mask is False from the start")
        return self.programs.prefill(self.params, self.experts, session, tokens, mask)

    def step(self, session: Session) -> tuple[Session, jax.Array, MoEMetrics]:
        """Decodes one token int32 [B] per sequence; metrics have a leading L.

        Nothing is synchronised, so nothing is checked here: the caller decodes at most
        `capacity - prompt length` tokens. A sequence past that is told by `Session.kv.length`.
        """
        return self.programs.step(self.params, self.experts, self.predictor, session)

    def preload(self, session: Session, granules: jax.Array) -> Session:
        """Fills the caches with `granules` int32 [R, n], a row of rank-local ids for every rank.

        An id is `layer * E + expert` with E the experts of a rank; -1 pads.
        """
        check(session.offload is not None, "a resident engine has no cache to preload")
        ranks = self.mesh.shape[AXIS]
        check(
            granules.ndim == 2 and granules.shape[0] == ranks,
            f"granules has shape {granules.shape}, expected ({ranks}, n)",
        )
        return self.programs.preload(self.experts, session, granules)


def make_engine(
    params: DecoderParams,
    experts: Store,
    cfg: DecoderConfig,
    mesh: Mesh,
    *,
    capacity: int,
    offload: OffloadConfig | None = None,
    prediction: Prediction | None = None,
) -> Engine:
    """Builds the two programs. Nothing is compiled before the first call.

    Args:
        params, experts: see `split_experts`; with `offload` the experts live in `pinned_host`, in
            `offload.column_parts` parts (`offload.columns`), there in two precisions
            (`offload.precision`), or in an opened folder.
        capacity: positions of the KV cache; prompt and new tokens must fit.
        offload: slot cache and prefetch; None keeps all experts on the device.
        prediction: what to prefetch; goes with `offload.prefetch_lanes > 0`. Lanes can do without
            when they admit, a prediction when experts are on disk, which are read ahead.
    """
    lanes = offload.prefetch_lanes if offload else 0
    on_disk = isinstance(experts, DiskExperts)
    held, parts = shapes_of(experts).w_gate.shape[1], offload.column_parts if offload else 1
    check(
        held == cfg.moe.num_experts * parts,
        f"{held} experts per layer in {parts} column parts, the model has {cfg.moe.num_experts}",
    )
    where = "on disk" if on_disk else "in two precisions"
    check(
        offload is not None or isinstance(experts, GatedWeights),
        f"experts {where} want an offload, with its slots",
    )
    admits = offload is not None and offload.admission
    check(
        admits or (prediction is None) == (lanes == 0) or (on_disk and lanes == 0),
        f"prefetch_lanes={lanes} and a prediction go together",
    )
    return Engine(
        cfg=cfg,
        mesh=mesh,
        capacity=capacity,
        params=params,
        experts=experts,
        predictor=prediction.params if prediction else None,
        programs=make_programs(
            experts,
            cfg,
            mesh,
            capacity=capacity,
            offload=offload,
            prediction=prediction,
        ),
    )
