"""Cases of an offloaded decoder, each compared with resident experts to the bit.

Every case runs the same text, token by token after a prefill, with forced routing: that of the
model's own routers, recorded, or an adversarial one in which consecutive tokens share no expert.

Axis letters:
    B  batch    S  prompt positions    N  decoded tokens    L  MoE layers    T  tokens of a call
    E  experts    K  experts per token    R  ranks    V  vocabulary
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from moejax.core.memory import device_sharding
from moejax.core.mesh import make_mesh
from moejax.costmodel.miss import MissCosts
from moejax.experts.stage import Stage, stacked
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.kernels.vma import vary_together
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import DecoderParams, forward, init_cache, init_decoder
from moejax.models.experts import split_experts
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import EXPERT_SPEC, to_device, to_host
from moejax.routing.config import RouterConfig
from moejax.serving.prediction import next_gate

L, E, K, VOCAB = 4, 16, 4, 64
CFG = moe_decoder(
    vocab_size=VOCAB,
    d_model=32,
    num_layers=L,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    moe=MoEConfig(d_ff=24, router=RouterConfig(num_experts=E, top_k=K), shared_d_ff=16),
)
BUDGETS = ("minimum", "25%", "50%", "all")
# Misses are divided about in half between link and host.
COSTS = MissCosts(fetch_s=2.0, host_read_s=1.0, host_row_s=0.5)
WAYS: dict[str, dict[str, Any]] = {
    "fetch": {},
    "fetch_lfu": {"policy": "lfu"},
    "average": {"policy": "average"},
    "prefetch": {"prefetch_lanes": 3},
    "prefetch_always": {"prefetch_lanes": 3, "fetch_mode": "always"},
    "admission": {"policy": "average", "prefetch_lanes": 3, "admission": True},
    "host": {"serve": "host"},
    "divide": {"serve": "divide", "costs": COSTS},
    "divide_prefetch": {"serve": "divide", "costs": COSTS, "prefetch_lanes": 2},
}
Routed = Literal["own", "adversarial"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way to serve under one budget."""

    way: str
    ranks: int
    batch: int
    budget: str

    @property
    def offload(self) -> OffloadConfig:
        here = L * E // self.ranks
        slots = {"minimum": L, "25%": here // 4, "50%": here // 2, "all": here}[self.budget]
        return OffloadConfig(num_slots=slots, **WAYS[self.way])


@struct.dataclass(kw_only=True)
class Run:
    """What a text gave."""

    logits: jax.Array  # [B, N + 1, V], behind the prompt and behind every token
    topk_idx: tuple[jax.Array, jax.Array]  # int32 [L, B * S, K] and [N, L, B, K]
    lookups: jax.Array  # int32 [N + 1], of the prefill and of every token; so are the others
    hits: jax.Array
    moved: jax.Array  # demand fetches and prefetches
    on_host: jax.Array


@dataclasses.dataclass(frozen=True)
class Model:
    """Random weights and one text of `batch` sequences: int32 [B, S] and [B, N]."""

    params: DecoderParams
    experts: GatedWeights
    prompt: jax.Array
    text: jax.Array


def make_model(batch: int, *, prompt: int, new: int) -> Model:
    params, experts = split_experts(init_decoder(jax.random.key(0), CFG), CFG)
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt + new), 0, VOCAB, jnp.int32)
    return Model(params, experts, tokens[:, :prompt], tokens[:, prompt:])


def adversarial(batch: int, *, prompt: int, new: int) -> tuple[jax.Array, jax.Array]:
    """Choices int32 [L, B * S, K] and [N, L, B, K] such that neighbours share no expert.

    Tokens that follow each other, and sequences side by side, go round the experts; every layer
    begins elsewhere, so that no layer foretells the next.
    """
    sequence, layer = np.arange(batch), np.arange(L)

    def choose(position: int) -> jax.Array:
        """int32 [L, B, K] at one position of every sequence."""
        first = K * (position + sequence) + 3 * layer[:, None]
        return jnp.asarray((first[..., None] + np.arange(K)) % E, jnp.int32)

    of_prompt = jnp.stack([choose(position) for position in range(prompt)], axis=2)
    of_text = jnp.stack([choose(prompt + position) for position in range(new)])
    return of_prompt.reshape(L, batch * prompt, K), of_text


def run_resident(model: Model, forced: tuple | None, *, jit: Callable = jax.jit) -> Run:
    """All experts on one device; `forced` None takes the routers' own choices."""
    mesh = make_mesh(expert=1, devices=jax.devices()[:1])

    def stage(experts: GatedWeights) -> Stage:
        return stacked(experts, axis="expert")

    return _program(model, mesh, to_device(model.experts, mesh), stage, None, jit)(forced)


def run_offloaded(model: Model, case: Case, *, jit: Callable = jax.jit) -> Callable[[tuple], Run]:
    """A function of forced choices, compiled once for all of them."""
    mesh = make_mesh(expert=case.ranks, devices=jax.devices()[: case.ranks])
    cfg, store = case.offload, to_host(model.experts, mesh)
    scorer = None
    if cfg.prefetch_lanes:
        prediction = next_gate(model.params, CFG)
        scorer = prediction.scorer(prediction.params)

    def stage(experts: GatedWeights) -> Stage:
        return offloaded(experts, cfg, scorer=scorer, axis="expert")

    return _program(model, mesh, store, stage, cfg, jit)


def _program(model, mesh, experts, stage, offload, jit):
    """Forced choices -> `Run`."""

    def body(params, experts, prompt, text, forced):
        state = None if offload is None else init_state(experts, offload)
        state, _ = vary_together(state, experts)  # every rank has its own
        batch, length = prompt.shape
        first, rest = (None, None) if forced is None else forced
        serve = partial(forward, params, cfg=CFG, stage=stage(experts))
        cache = init_cache(CFG, batch, length + text.shape[1])
        out = serve(prompt, cache=cache, forced_idx=first, stage_state=state)

        def step(carry, xs):
            cache, state = carry
            token, forced_idx = xs
            out = serve(token[:, None], cache=cache, forced_idx=forced_idx, stage_state=state)
            kept = (out.logits[:, -1], out.record.topk_idx, out.metrics)
            return (out.cache, out.stage_state), kept

        _, (logits, chosen, metrics) = jax.lax.scan(
            step, (out.cache, out.stage_state), (text.T, rest)
        )
        every = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), out.metrics, metrics)
        total = jax.tree.map(lambda leaf: leaf.sum(1), every)
        return Run(
            logits=jnp.concatenate([out.logits[:, -1:], jnp.swapaxes(logits, 0, 1)], 1),
            topk_idx=(out.record.topk_idx, chosen),
            lookups=total.lookups,
            hits=total.hits,
            moved=total.demand_fetches + total.prefetches,
            on_host=total.host_computes,
        )

    specs = (P(), EXPERT_SPEC, P(), P(), P())
    program = jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P()))
    everywhere = device_sharding(mesh)
    params, prompt, text = jax.device_put((model.params, model.prompt, model.text), everywhere)
    return lambda forced: program(params, experts, prompt, text, jax.device_put(forced, everywhere))


def check_case(model: Model, case: Case, resident: dict[Routed, Run], **how: Any) -> dict[str, Any]:
    """Figures of one case: whether its logits are the resident ones, under every routing."""
    program, found = run_offloaded(model, case, **how), {}
    for routed, want in resident.items():
        got = program(want.topk_idx)
        difference = np.abs(np.asarray(got.logits) - np.asarray(want.logits))
        found[routed] = {
            "equal": bool(np.array_equal(got.logits, want.logits)),
            "relative_difference": float(difference.max() / np.abs(want.logits).max()),
            "hit_rate": float(got.hits[1:].sum() / got.lookups[1:].sum()),
            "moved": int(got.moved.sum()),
            "on_host": int(got.on_host.sum()),
            "times_through_the_slots": float(
                got.moved.sum() / (case.offload.num_slots * case.ranks)
            ),
        }
    return dataclasses.asdict(case) | {"routed": found}
