"""gpt-oss (arXiv 2508.10925): sinks, alternating windows, biased experts, clamped SwiGLU."""

import dataclasses

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    read_attention,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rules import AS_IS, GATE_UP_INTERLEAVED, LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig

_MLP = LAYER + "mlp."


def read_config(fields: Fields) -> DecoderConfig:
    fields.want("swiglu_alpha", 1.702)
    fields.want("swiglu_limit", 7.0)
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts", "num_experts"),
        top_k=fields.integer("num_experts_per_tok", "experts_per_token"),
        bias=True,
    )
    moe = MoEConfig(
        d_ff=fields.integer("intermediate_size"),
        router=router,
        bias=True,
        activation="clamped_swiglu",
    )
    bias = "all" if fields.flag("attention_bias", default=True) else "none"
    full = read_attention(fields, bias=bias, sinks=True)
    kinds = {
        "full_attention": full,
        "sliding_attention": dataclasses.replace(full, window=fields.integer("sliding_window")),
    }
    layers = [
        LayerGroup(num_layers=1, moe=moe, attention=kinds[kind])
        for kind in fields.layer_types(
            tuple(kinds), default=("sliding_attention", "full_attention")
        )
    ]
    return read_decoder(fields, full, layers)


def rules(cfg: DecoderConfig) -> Rules:
    w_both, b_both = "experts.w_gate experts.w_up", "experts.b_gate experts.b_up"
    experts = _MLP + "experts."
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(_MLP + "router.weight", "mlp.router.w_router", LINEAR),
        Rule(_MLP + "router.bias", "mlp.router.b_router", AS_IS),
        Rule(experts + "gate_up_proj", w_both, GATE_UP_INTERLEAVED, stacked=True),
        Rule(experts + "gate_up_proj_bias", b_both, GATE_UP_INTERLEAVED, stacked=True),
        Rule(experts + "down_proj", "experts.w_down", AS_IS, stacked=True),
        Rule(experts + "down_proj_bias", "experts.b_down", AS_IS, stacked=True),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
