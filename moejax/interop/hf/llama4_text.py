"""Llama 4, text: weights on the experts' inputs; layers with rope and chunks, some with neither."""

import dataclasses

from moejax.interop.hf.architecture import (
    LAYER,
    NORMS,
    OUTSIDE,
    Architecture,
    attention_rules,
    gated_rules,
    read_attention,
    read_decoder,
)
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rules import AS_IS, GATE_UP_AS_IS, LINEAR, Rule, Rules, paired
from moejax.layers.attention import AttentionConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup
from moejax.routing.config import RouterConfig

_MLP = LAYER + "feed_forward"


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    d_ff = fields.integer("intermediate_size")
    router = RouterConfig(
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        renormalize=False,
    )
    moe = MoEConfig(d_ff=d_ff, router=router, shared_d_ff=d_ff, weigh="input")
    total = fields.integer("num_hidden_layers")
    step = fields.integer("interleave_moe_layer_step", default=1)
    with_experts = fields.get("moe_layers", default=list(range(step - 1, total, step)))
    kinds, dense_d_ff = read_kinds(fields), fields.integer("intermediate_size_mlp")
    layers = [
        LayerGroup(num_layers=1, attention=kind, moe=moe)
        if i in with_experts
        else LayerGroup(num_layers=1, attention=kind, d_ff=dense_d_ff)
        for i, kind in enumerate(kinds)
    ]
    return read_decoder(fields, kinds[0], layers)


def read_kinds(fields: Fields) -> list[AttentionConfig]:
    """The attention of every layer: rope or none, chunks or the whole context."""
    total = fields.integer("num_hidden_layers")
    every = fields.integer("no_rope_layer_interval", default=4)
    ropes = fields.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(total)]
    chunks = ["chunked_attention" if rope else "full_attention" for rope in ropes]
    types = fields.layer_types(("chunked_attention", "full_attention"), default=tuple(chunks))
    bias = "all" if fields.flag("attention_bias", default=False) else "none"
    eps = fields.number("rms_norm_eps", default=1e-5)
    plain = read_attention(fields, bias=bias, norm_eps=eps)
    norm = "unit" if fields.flag("use_qk_norm", default=True) else "none"
    floor, slope = (
        fields.number("floor_scale", default=8192),
        fields.number("attn_scale", default=0.1),
    )
    tuned = fields.flag("attn_temperature_tuning", default=True)
    rotated = dataclasses.replace(plain, qk_norm=norm)
    bare = dataclasses.replace(plain, rope=None, temperature=(floor, slope) if tuned else None)
    chunk = fields.integer("attention_chunk_size", default=8192)
    return [
        dataclasses.replace(
            rotated if rope else bare, chunk=chunk if kind == "chunked_attention" else 0
        )
        for rope, kind in zip(ropes, types, strict=True)
    ]


def rules(cfg: DecoderConfig) -> Rules:
    assert isinstance(cfg.attention, AttentionConfig)
    both = "experts.w_gate experts.w_up"
    return (
        *OUTSIDE,
        *NORMS,
        *attention_rules(paired(cfg.attention.head_dim)),
        Rule(_MLP + ".router.weight", "mlp.router.w_router", LINEAR),
        Rule(_MLP + ".experts.gate_up_proj", both, GATE_UP_AS_IS, stacked=True),
        Rule(_MLP + ".experts.down_proj", "experts.w_down", AS_IS, stacked=True),
        *gated_rules(_MLP + ".shared_expert", "mlp.shared"),
        *gated_rules(_MLP, "mlp"),
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
