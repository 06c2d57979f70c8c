"""GLM-4.5 (arXiv 2508.06471): half of a head rotated, DeepSeek-V3's router over plain attention."""

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    expert_rules,
    gated_rules,
    layers_behind,
    leading_dense,
    read_attention,
    read_decoder,
    sigmoid_router_rules,
)
from moejax.interop.hf.deepseek_v3 import read_moe, read_router
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rules import Rules
from moejax.models.config import DecoderConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    attention = read_attention(
        fields,
        bias="qkv" if fields.flag("attention_bias", default=False) else "none",
        qk_norm="head" if fields.flag("use_qk_norm", default=False) else "none",
        norm_eps=fields.number("rms_norm_eps", default=1e-5),
    )
    layers = leading_dense(fields, read_moe(fields, read_router(fields)))
    return read_decoder(fields, attention, layers)


def rules(cfg: DecoderConfig) -> Rules:
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(),
        *sigmoid_router_rules(),
        expert_rules("mlp"),
        *gated_rules(LAYER + "mlp.shared_experts", "mlp.shared"),
        *gated_rules(LAYER + "mlp", "mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules, ignored=layers_behind)
