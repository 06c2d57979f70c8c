"""Mixtral (arXiv 2401.04088): softmax over all experts, the chosen two renormalised."""

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
from moejax.interop.hf.rules import LINEAR, Either, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts"), top_k=fields.integer("num_experts_per_tok")
    )
    moe = MoEConfig(d_ff=fields.integer("intermediate_size"), router=router)
    attention = read_attention(fields, window=fields.integer("sliding_window", default=0))
    layers = [LayerGroup(num_layers=1, moe=moe)] * fields.integer("num_hidden_layers")
    return read_decoder(fields, attention, layers)


def rules(cfg: DecoderConfig) -> Rules:
    router = "gate.weight"
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Either(
            tuple(
                (Rule(f"{LAYER}{block}.{router}", "mlp.router.w_router", LINEAR),)
                for block in ("block_sparse_moe", "mlp")
            )
        ),
        expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
