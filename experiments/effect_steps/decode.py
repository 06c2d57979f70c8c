"""Measured tokens/s of the engine with each predictor, beside LRU alone and resident, in turns."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.offload_steps.arms import RESIDENT, Arm, Model, check_tokens, resident_arm
from experiments.offload_steps.arms import time_arms as time_in_turns
from experiments.offload_steps.policies import POLICIES
from moejax.core.mesh import make_mesh
from moejax.models.config import DecoderConfig
from moejax.models.decoder import DecoderParams
from moejax.models.experts import split_experts
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import expert_bytes, to_host
from moejax.serving.engine import make_engine
from moejax.serving.prediction import Prediction
from moejax.simulator.plans import slots_of_fraction

LRU = "none"
_WARMUP = 2  # untimed steps of `interleave`


def model_of(params: DecoderParams, cfg: DecoderConfig, prompts: np.ndarray, steps: int) -> Model:
    """What all arms share: weights on one device, prompts int32 [B, S] and room for `steps`."""
    dense, experts = split_experts(params, cfg)
    return Model(
        cfg=cfg,
        params=dense,
        experts=experts,
        mesh=make_mesh(expert=1, devices=jax.devices()[:1]),
        prompts=jnp.asarray(prompts, jnp.int32),
        capacity=prompts.shape[1] + steps + _WARMUP + 1,
    )


def measure(
    model: Model,
    predictions: Mapping[str, Prediction],
    *,
    fraction: float,
    lanes: int,
    steps: int,
) -> dict[str, Any]:
    """Every predictor with `lanes` landing buffers, `fraction` of the experts' bytes on the device.

    The buffers count: whoever predicts has as many slots less. Tokens must be the resident ones on
    CPU, or it raises.
    """
    cfg = model.cfg
    slots = slots_of_fraction(fraction, cfg.num_moe_layers, cfg.moe.num_experts)
    store = to_host(model.experts, model.mesh)

    def arm(prediction: Prediction | None) -> Arm:
        ahead = lanes if prediction else 0
        engine = make_engine(
            model.params, store, cfg, model.mesh, capacity=model.capacity, prediction=prediction,
            offload=OffloadConfig(num_slots=slots - ahead, prefetch_lanes=ahead),
        )  # fmt: skip
        return Arm(engine, model, None)

    arms = {RESIDENT: resident_arm(model), LRU: arm(None)}
    arms |= {name: arm(one) for name, one in predictions.items()}
    seconds = time_in_turns(arms, steps=steps)
    check_tokens(arms, dict.fromkeys([LRU, *predictions], POLICIES["lru"]))
    found = {
        name: arm_effect(
            arms[name], seconds[name], seconds[LRU], bytes_of_expert=expert_bytes(store)
        )
        for name in (LRU, *predictions)
    }
    batch = len(model.prompts)
    return {
        "num_slots": slots,
        "lanes": lanes,
        "resident_tokens_per_s": batch / seconds[RESIDENT],
        "predictors": found,
    }


def arm_effect(
    arm: Arm, seconds: float, base_s: float, *, bytes_of_expert: int
) -> dict[str, float]:
    """Figures of an arm whose step takes `seconds`, beside `base_s` without prediction."""
    batch = len(arm.tokens[0])
    names = ("lookups", "hits", "demand_fetches", "prefetches", "prefetches_wasted")
    lookups, hits, fetches, ahead, wasted = (arm.count(name, _WARMUP) for name in names)
    return {
        "ms_per_step": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "gain": base_s / seconds - 1,
        "hit_rate": hits / lookups,
        "moved_bytes_per_token": (fetches + ahead) * bytes_of_expert / batch,
        "wasted_bytes_per_token": wasted * bytes_of_expert / batch,
        "prefetched_and_wanted": 1 - wasted / ahead if ahead else 0.0,
    }
