"""MiniMax-M2: queries and keys normalised over all heads, partly rotated; sigmoid routing."""

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    expert_rules,
    layers_behind,
    read_attention,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rules import AS_IS, LINEAR, Rule, Rules
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig

_BLOCK = "block_sparse_moe"


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("scoring_func", "sigmoid")
    fields.want("shared_intermediate_size", 0)
    if fields.get("rotary_dim") is not None:  # how the released checkpoints say it
        partial = fields.integer("rotary_dim") / fields.integer("head_dim")
        fields = Fields({**fields.values, "partial_rotary_factor": partial})
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        correction_bias=True,
    )
    moe = MoEConfig(d_ff=fields.integer("intermediate_size"), router=router)
    eps = fields.number("rms_norm_eps", default=1e-6)
    attention = read_attention(fields, qk_norm="width", norm_eps=eps)
    layers = [LayerGroup(num_layers=1, moe=moe)] * fields.integer("num_hidden_layers")
    return read_decoder(fields, attention, layers)


def rules(cfg: DecoderConfig) -> Rules:
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        Rule(f"{LAYER}{_BLOCK}.gate.weight", "mlp.router.w_router", LINEAR),
        Rule(f"{LAYER}{_BLOCK}.e_score_correction_bias", "mlp.router.correction_bias", AS_IS),
        expert_rules(_BLOCK, ("w1", "w3", "w2")),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules, ignored=layers_behind)
