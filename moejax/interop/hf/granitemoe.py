"""Granite 3 MoE: softmax over the chosen experts, and four multipliers."""

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
from moejax.interop.hf.rules import GATE_UP, LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig

_BLOCK = LAYER + "block_sparse_moe."


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    # A softmax over the chosen logits is one over all of them, renormalised.
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
    )
    moe = MoEConfig(d_ff=fields.integer("intermediate_size"), router=router)
    attention = read_attention(
        fields,
        scale=fields.number("attention_multiplier", default=1.0),
        bias="all" if fields.flag("attention_bias", default=False) else "none",
    )
    return read_decoder(
        fields,
        attention,
        [LayerGroup(num_layers=1, moe=moe)] * fields.integer("num_hidden_layers"),
        embed_scale=fields.number("embedding_multiplier", default=1.0),
        residual_scale=fields.number("residual_multiplier", default=1.0),
        logit_scale=1 / fields.number("logits_scaling", default=1.0),
    )


def rules(cfg: DecoderConfig) -> Rules:
    both = "experts.w_gate experts.w_up"
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(_BLOCK + "router.layer.weight", "mlp.router.w_router", LINEAR),
        Rule(_BLOCK + "input_linear.weight", both, GATE_UP, stacked=True),
        Rule(_BLOCK + "output_linear.weight", "experts.w_down", LINEAR, stacked=True),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
