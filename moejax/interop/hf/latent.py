"""Multi-head latent attention as the DeepSeek family stores it."""

from moejax.interop.hf.fields import Fields
from moejax.interop.hf.rope import read_rope, score_scale
from moejax.interop.hf.rules import AS_IS, LINEAR, Rule, Rules, heads_of_two, linear, paired
from moejax.layers.attention import MLAConfig


def read_latent(fields: Fields, **extras) -> MLAConfig:
    """The attention of a config.json with `kv_lora_rank`; its norms have an eps of their own."""
    fields.want("attention_bias", False)
    fields.want("rope_interleave", True)
    nope_dim, rope_dim = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    return MLAConfig(
        num_heads=fields.integer("num_attention_heads"),
        kv_rank=fields.integer("kv_lora_rank"),
        q_rank=fields.integer("q_lora_rank", default=0),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=fields.integer("v_head_dim"),
        rope=read_rope(fields, rope_dim),
        norm_eps=1e-6,
        scale=score_scale(fields, nope_dim + rope_dim),
        **extras,
    )


def latent_rules(cfg: MLAConfig, prefix: str) -> Rules:
    """Rotated dims are stored as neighbouring pairs, keys and values of a head together."""
    query = "q_b_proj" if cfg.q_rank else "q_proj"
    return (
        Rule(prefix + "q_a_proj.weight", "attention.w_q_down", LINEAR),
        Rule(prefix + "q_a_layernorm.weight", "attention.q_norm", AS_IS),
        Rule(prefix + f"{query}.weight", "attention.w_q", paired(cfg.rope_dim)),
        Rule(prefix + "kv_a_proj_with_mqa.weight", "attention.w_kv_down", paired(cfg.rope_dim)),
        Rule(prefix + "kv_a_layernorm.weight", "attention.kv_norm", AS_IS),
        Rule(
            prefix + "kv_b_proj.weight",
            "attention.w_k attention.w_v",
            heads_of_two(cfg.nope_dim, cfg.v_dim),
        ),
        Rule(prefix + "o_proj.weight", "attention.w_o", linear(inputs=2)),
    )
