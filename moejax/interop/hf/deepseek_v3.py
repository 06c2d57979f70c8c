"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, sigmoid routing inside best groups."""

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    expert_rules,
    gated_rules,
    layers_behind,
    leading_dense,
    read_decoder,
    sigmoid_router_rules,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.latent import latent_rules, read_latent
from moejax.interop.hf.rules import Rules
from moejax.layers.attention import MLAConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig
from moejax.routing.config import RouterConfig


def read_router(fields: Fields) -> RouterConfig:
    """Section 2.1.2: a bias for the choice alone, groups by the sum of their two best experts."""
    fields.want("scoring_func", "sigmoid")
    fields.want("topk_method", "noaux_tc")
    return RouterConfig(
        num_experts=fields.integer("n_routed_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        correction_bias=True,
        renormalize=fields.flag("norm_topk_prob", default=True),
        scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        num_groups=fields.integer("n_group", default=1),
        top_groups=fields.integer("topk_group", default=1),
        group_score="top2_sum",
    )


def read_moe(fields: Fields, router: RouterConfig) -> MoEConfig:
    """Routed experts, and shared ones as one of their summed width."""
    d_ff = fields.integer("moe_intermediate_size")
    shared = fields.integer("n_shared_experts", default=0)
    return MoEConfig(d_ff=d_ff, router=router, shared_d_ff=d_ff * shared)


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    layers = leading_dense(fields, read_moe(fields, read_router(fields)))
    return read_decoder(fields, read_latent(fields), layers)


def rules(cfg: DecoderConfig) -> Rules:
    assert isinstance(cfg.attention, MLAConfig)
    return (
        *OUTSIDE,
        *NORMS,
        *latent_rules(cfg.attention, LAYER + "self_attn."),
        *sigmoid_router_rules(),
        expert_rules("mlp"),
        *gated_rules(LAYER + "mlp.shared_experts", "mlp.shared"),
        *gated_rules(LAYER + "mlp", "mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules, ignored=layers_behind)
