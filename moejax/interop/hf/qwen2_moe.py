"""Qwen2-MoE (arXiv 2407.10671): biased queries, keys and values; a gated shared expert."""

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    expert_rules,
    gated_rules,
    read_attention,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.qwen3_moe import read_layers, read_router
from moejax.interop.hf.rules import FLAT_ROW, LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("use_sliding_window", False)
    moe = MoEConfig(
        d_ff=fields.integer("moe_intermediate_size"),
        router=read_router(fields),
        shared_d_ff=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    bias = "qkv" if fields.flag("qkv_bias", default=True) else "none"
    attention = read_attention(fields, bias=bias)
    return read_decoder(fields, attention, read_layers(fields, moe))


def rules(cfg: DecoderConfig) -> Rules:
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(LAYER + "mlp.gate.weight", "mlp.router.w_router", LINEAR),
        expert_rules("mlp"),
        *gated_rules(LAYER + "mlp.shared_expert", "mlp.shared"),
        Rule(LAYER + "mlp.shared_expert_gate.weight", "mlp.w_shared_gate", FLAT_ROW),
        *gated_rules(LAYER + "mlp", "mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
