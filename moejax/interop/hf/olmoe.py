"""OLMoE (arXiv 2409.02060): queries and keys normalised over all heads, weights as they come."""

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    expert_rules,
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
    fields.want("clip_qkv")
    router = RouterConfig(
        num_experts=fields.integer("num_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        renormalize=fields.flag("norm_topk_prob", default=False),
    )
    moe = MoEConfig(d_ff=fields.integer("intermediate_size"), router=router)
    attention = read_attention(
        fields,
        qk_norm="width",
        norm_eps=fields.number("rms_norm_eps", default=1e-5),
        bias="all" if fields.flag("attention_bias", default=False) else "none",
    )
    layers = [LayerGroup(num_layers=1, moe=moe)] * fields.integer("num_hidden_layers")
    return read_decoder(fields, attention, layers)


def rules(cfg: DecoderConfig) -> Rules:
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(LAYER + "mlp.gate.weight", "mlp.router.w_router", LINEAR),
        expert_rules("mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
