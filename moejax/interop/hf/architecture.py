"""What an architecture is: a config mapping and a name map; and the parts that many share."""

import dataclasses
from collections.abc import Callable

from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rope import read_rope
from moejax.interop.hf.rules import (
    AS_IS,
    FLAT,
    GATE_UP,
    LINEAR,
    Either,
    Layout,
    Rule,
    Rules,
    Shape,
    linear,
)
from moejax.layers.attention import AttentionConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, LayerGroup, group_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One `model_type`.

    Attributes:
        read_config: config.json -> the decoder, in float32; the dtype is the loader's to say.
        rules: the name map, given the decoder.
        ignored: patterns of tensors that are not part of the decoder, given the decoder.
        placeholders: shapes of tensors that nothing computes with: read by nobody, written as
            zeros.
    """

    read_config: Callable[[Fields], DecoderConfig]
    rules: Callable[[DecoderConfig], Rules]
    ignored: Callable[[DecoderConfig], tuple[str, ...]] = lambda cfg: ()
    placeholders: Callable[[DecoderConfig], dict[str, Shape]] = lambda cfg: {}


LAYER = "model.layers.{l}."

OUTSIDE = (
    Rule("model.embed_tokens.weight", "embed", AS_IS),
    Rule("model.norm.weight", "final_norm", AS_IS),
    Rule("lm_head.weight", "w_out", LINEAR),
)
NORMS = (
    Rule(LAYER + "input_layernorm.weight", "attention_norm", AS_IS),
    Rule(LAYER + "post_attention_layernorm.weight", "mlp_norm", AS_IS),
)


def attention_rules(qk: Layout = LINEAR, prefix: str = LAYER + "self_attn.") -> Rules:
    """Grouped-query attention; `qk` is the layout of queries and keys."""
    return (
        Rule(prefix + "q_proj.weight", "attention.w_q", qk),
        Rule(prefix + "k_proj.weight", "attention.w_k", qk),
        Rule(prefix + "v_proj.weight", "attention.w_v", LINEAR),
        Rule(prefix + "o_proj.weight", "attention.w_o", linear(inputs=2)),
        Rule(prefix + "q_proj.bias", "attention.b_q", FLAT),
        Rule(prefix + "k_proj.bias", "attention.b_k", FLAT),
        Rule(prefix + "v_proj.bias", "attention.b_v", FLAT),
        Rule(prefix + "o_proj.bias", "attention.b_o", FLAT),
        Rule(prefix + "q_norm.weight", "attention.q_norm", FLAT),
        Rule(prefix + "k_norm.weight", "attention.k_norm", FLAT),
        Rule(prefix + "sinks", "attention.sinks", AS_IS),
    )


def gated_rules(prefix: str, to: str) -> Rules:
    """One gated MLP, such as a dense layer's or a shared expert."""
    return tuple(
        Rule(f"{prefix}.{part}_proj.weight", f"{to}.w_{part}", LINEAR)
        for part in ("gate", "up", "down")
    )


def expert_rules(
    block: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    layer: str = LAYER,
) -> Either:
    """Routed experts: a tensor per expert and part below `block`, or two fused ones of all."""
    each = tuple(
        Rule(layer + f"{block}.experts.{{e}}.{name}.weight", f"experts.{part}", LINEAR)
        for name, part in zip(names, ("w_gate", "w_up", "w_down"), strict=True)
    )
    prefix = layer + "mlp.experts."
    both = Rule(prefix + "gate_up_proj", "experts.w_gate experts.w_up", GATE_UP, stacked=True)
    down = Rule(prefix + "down_proj", "experts.w_down", LINEAR, stacked=True)
    return Either((each, (both, down)))


def sigmoid_router_rules(block: str = LAYER + "mlp.gate") -> Rules:
    """A router whose choice is corrected by a bias."""
    return (
        Rule(f"{block}.weight", "mlp.router.w_router", LINEAR),
        Rule(f"{block}.e_score_correction_bias", "mlp.router.correction_bias", AS_IS),
    )


def layers_behind(cfg: DecoderConfig) -> tuple[str, ...]:
    """Patterns of layers of multi-token prediction, numbered on from the decoder's."""
    last = cfg.num_layers
    return tuple(rf"model\.layers\.{last + i}\." for i in range(4))


def leading_dense(fields: Fields, moe: MoEConfig) -> list[LayerGroup]:
    """`first_k_dense_replace` dense layers, then MoE layers."""
    fields.want("moe_layer_freq", 1)
    total, dense = fields.integer("num_hidden_layers"), fields.integer("first_k_dense_replace")
    plain = LayerGroup(num_layers=1, d_ff=fields.integer("intermediate_size"))
    return [plain] * min(dense, total) + [LayerGroup(num_layers=1, moe=moe)] * (total - dense)


def read_attention(fields: Fields, **extras) -> AttentionConfig:
    """Grouped-query attention as most config.json describe it."""
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", default=fields.integer("hidden_size") // heads)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        **extras,
    )


def read_decoder(fields: Fields, attention, layers: list[LayerGroup], **extras) -> DecoderConfig:
    """The decoder of `layers`, one layer each."""
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        attention=attention,
        groups=group_layers(layers),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        **extras,
    )
