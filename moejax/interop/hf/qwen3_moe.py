"""Qwen3-MoE (arXiv 2505.09388): queries and keys normalised head by head, some layers dense."""

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
from moejax.interop.hf.rules import LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("use_sliding_window", False)
    moe = MoEConfig(d_ff=fields.integer("moe_intermediate_size"), router=read_router(fields))
    attention = read_attention(
        fields,
        qk_norm="head",
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        bias="all" if fields.flag("attention_bias", default=False) else "none",
    )
    return read_decoder(fields, attention, read_layers(fields, moe))


def read_router(fields: Fields) -> RouterConfig:
    """Softmax over all experts; the flag says whether the chosen ones are renormalised."""
    return RouterConfig(
        num_experts=fields.integer("num_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        renormalize=fields.flag("norm_topk_prob", default=False),
    )


def read_layers(fields: Fields, moe: MoEConfig) -> list[LayerGroup]:
    """Every `decoder_sparse_step`-th layer has experts, but those of `mlp_only_layers`."""
    dense = LayerGroup(num_layers=1, d_ff=fields.integer("intermediate_size"))
    step, only_dense = (
        fields.integer("decoder_sparse_step", default=1),
        fields.get("mlp_only_layers"),
    )
    return [
        LayerGroup(num_layers=1, moe=moe)
        if (layer + 1) % step == 0 and layer not in (only_dense or [])
        else dense
        for layer in range(fields.integer("num_hidden_layers"))
    ]


def rules(cfg: DecoderConfig) -> Rules:
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(LAYER + "mlp.gate.weight", "mlp.router.w_router", LINEAR),
        expert_rules("mlp"),
        *gated_rules(LAYER + "mlp", "mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
