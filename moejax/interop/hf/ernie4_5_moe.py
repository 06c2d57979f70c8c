"""Ernie 4.5 (ERNIE technical report, 2025): softmax routing with a bias for the choice alone."""

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
from moejax.interop.hf.rules import FLAT_ROW, LINEAR, Rule, Rules, paired
from moejax.layers.attention import AttentionConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("use_bias", False)
    d_ff = fields.integer("moe_intermediate_size")
    router = RouterConfig(
        num_experts=fields.integer("moe_num_experts", "num_local_experts"),
        top_k=fields.integer("moe_k", "num_experts_per_tok"),
        correction_bias=True,
    )
    shared = fields.integer("moe_num_shared_experts", default=0)
    moe = LayerGroup(
        num_layers=1, moe=MoEConfig(d_ff=d_ff, router=router, shared_d_ff=d_ff * shared)
    )
    dense = LayerGroup(num_layers=1, d_ff=fields.integer("intermediate_size"))
    total = fields.integer("num_hidden_layers")
    first = fields.integer("moe_layer_start_index", default=1)
    last = fields.integer("moe_layer_end_index", default=-1)
    last = last if last >= 0 else total - 1
    every = fields.integer("moe_layer_interval", default=1)
    layers = [moe if first <= i <= last and (i + 1) % every == 0 else dense for i in range(total)]
    return read_decoder(fields, read_attention(fields), layers)


def rules(cfg: DecoderConfig) -> Rules:
    assert isinstance(cfg.attention, AttentionConfig)
    bias = LAYER + "mlp.moe_statics.e_score_correction_bias"
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(paired(cfg.attention.head_dim)),
        Rule(LAYER + "mlp.gate.weight", "mlp.router.w_router", LINEAR),
        Rule(bias, "mlp.router.correction_bias", FLAT_ROW),
        expert_rules("mlp"),
        *gated_rules(LAYER + "mlp.shared_experts", "mlp.shared"),
        *gated_rules(LAYER + "mlp", "mlp"),
    )


ARCHITECTURE = Architecture(
    read_config=read_config, rules=rules, ignored=lambda cfg: (r"model\.mtp_",)
)
