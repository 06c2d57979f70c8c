"""LongCat-Flash (arXiv 2509.01322): two attentions and dense MLPs per layer, experts beside them.

One of its layers is two of ours: the experts see what the first dense MLP sees, and join the
residual stream after the second. Some experts return their input.
"""

from moejax.interop.hf.architecture import (
    OUTSIDE,
    Architecture,
    expert_rules,
    gated_rules,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.latent import latent_rules, read_latent
from moejax.interop.hf.rules import AS_IS, LINEAR, Rule, Rules, Shape
from moejax.layers.attention import MLAConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig

_LAYER = "model.layers.{half}."
_ROUTER = _LAYER + "mlp.router."


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("router_bias", False)
    fields.want("zero_expert_type", "identity")
    fields.want("attention_method", "MLA")
    zero, d_model = fields.integer("zero_expert_num", default=0), fields.integer("hidden_size")
    router = RouterConfig(
        num_experts=fields.integer("n_routed_experts", "num_local_experts") + zero,
        top_k=fields.integer("moe_topk", "num_experts_per_tok"),
        correction_bias=True,
        renormalize=False,
        scaling_factor=fields.number("routed_scaling_factor", default=1.0),
    )
    moe = MoEConfig(d_ff=fields.integer("expert_ffn_hidden_size"), router=router, zero_experts=zero)
    attention = read_latent(
        fields,
        q_scale=(d_model / fields.integer("q_lora_rank")) ** 0.5,
        kv_scale=(d_model / fields.integer("kv_lora_rank")) ** 0.5,
    )
    d_ff = fields.integer("ffn_hidden_size")
    first = LayerGroup(num_layers=1, moe=moe, d_ff=d_ff, shortcut=True)
    second = LayerGroup(num_layers=1, d_ff=d_ff)
    layers = [first, second] * fields.integer("num_layers", "num_hidden_layers")
    return read_decoder(fields, attention, layers)


def rules(cfg: DecoderConfig) -> Rules:
    assert isinstance(cfg.attention, MLAConfig)
    norm = "layernorm.{side}.weight"
    return (
        *OUTSIDE,
        Rule(_LAYER + "input_" + norm, "attention_norm", AS_IS),
        Rule(_LAYER + "post_attention_" + norm, "mlp_norm", AS_IS),
        *latent_rules(cfg.attention, _LAYER + "self_attn.{side}."),
        *gated_rules(_LAYER + "mlps.{side}", "dense"),
        *gated_rules(_LAYER + "mlps.{side}", "mlp"),
        Rule(_ROUTER + "classifier.weight", "mlp.router.w_router", LINEAR),
        Rule(_ROUTER + "e_score_correction_bias", "mlp.router.correction_bias", AS_IS),
        expert_rules("mlp", layer=_LAYER),
    )


def placeholders(cfg: DecoderConfig) -> dict[str, Shape]:
    """`transformers` gives experts that return their input a gate and an up projection."""
    shape = (cfg.moe.d_ff, cfg.d_model)
    return {
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight": shape
        for layer in range(cfg.num_layers // 2)
        for e in range(cfg.moe.num_experts, cfg.moe.router.num_experts)
        for part in ("gate", "up")
    }


ARCHITECTURE = Architecture(
    read_config=read_config,
    rules=rules,
    ignored=lambda cfg: (r"model\.mtp",),
    placeholders=placeholders,
)
