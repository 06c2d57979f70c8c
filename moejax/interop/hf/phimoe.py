"""Phi-3.5-MoE (arXiv 2404.14219): layer norms, biases, and the sparse mixer for a router."""

from moejax.interop.hf.architecture import (
    LAYER,
    Architecture,
    attention_rules,
    expert_rules,
    read_attention,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rules import AS_IS, LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        mixer_threshold=fields.number("router_jitter_noise", default=0.01),
        renormalize=False,
    )
    moe = MoEConfig(d_ff=fields.integer("intermediate_size"), router=router)
    attention = read_attention(
        fields,
        bias="all" if fields.flag("attention_bias", default=False) else "none",
        window=fields.integer("sliding_window", default=0),
    )
    return read_decoder(
        fields,
        attention,
        [LayerGroup(num_layers=1, moe=moe)] * fields.integer("num_hidden_layers"),
        norm="layer",
        out_bias=fields.flag("lm_head_bias", default=False),
    )


def rules(cfg: DecoderConfig) -> Rules:
    return (
        Rule("model.embed_tokens.weight", "embed", AS_IS),
        Rule("lm_head.weight", "w_out", LINEAR),
        Rule("lm_head.bias", "b_out", AS_IS),
        *_norm("model.norm", "final_norm"),
        *_norm(LAYER + "input_layernorm", "attention_norm"),
        *_norm(LAYER + "post_attention_layernorm", "mlp_norm"),
        *attention_rules(),
        Rule(LAYER + "block_sparse_moe.gate.weight", "mlp.router.w_router", LINEAR),
        expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    )


def _norm(name: str, to: str) -> Rules:
    return Rule(f"{name}.weight", f"{to}.scale", AS_IS), Rule(f"{name}.bias", f"{to}.bias", AS_IS)


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
