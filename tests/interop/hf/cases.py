"""The table of architectures and shapes that parity is tested on.

The first shape of an architecture runs by default, the others with --full. Between them: ratios of
heads, biases, tied embeddings, shared experts, head dims that are not hidden / heads, windows that
are shorter than the sequences.
"""

import json

import pytest

from tests.interop.hf.models import Case

EXPERTS = dict(num_local_experts=8, num_experts_per_tok=2)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=1.0,
)
QWEN = dict(EXPERTS, intermediate_size=40, moe_intermediate_size=24)
LATENT = dict(
    EXPERTS,
    num_key_value_heads=4,
    intermediate_size=40,
    moe_intermediate_size=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=16,
    first_k_dense_replace=1,
)
GLM = dict(
    EXPERTS,
    head_dim=16,
    intermediate_size=40,
    moe_intermediate_size=24,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
ERNIE = dict(
    intermediate_size=40,
    moe_intermediate_size=24,
    moe_num_experts=8,
    moe_k=2,
    moe_layer_start_index=1,
)
GRANITE = dict(EXPERTS, intermediate_size=24, embedding_multiplier=3.0, residual_multiplier=0.6)
LLAMA4 = dict(
    num_local_experts=8,
    num_experts_per_tok=1,
    head_dim=16,
    intermediate_size=24,
    intermediate_size_mlp=40,
    attention_chunk_size=6,
    floor_scale=4,
    attn_scale=0.3,
    interleave_moe_layer_step=1,
)
LONGCAT = dict(
    num_hidden_layers=4,  # two for each of its layers
    num_key_value_heads=4,
    ffn_hidden_size=40,
    expert_ffn_hidden_size=24,
    n_routed_experts=8,
    zero_expert_num=4,
    moe_topk=3,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=16,
    head_dim=8,
    routed_scaling_factor=2.0,
)
SHAPES = {
    "mixtral": {
        "plain": dict(EXPERTS, intermediate_size=24),
        "mha_tied": dict(
            EXPERTS, intermediate_size=24, num_key_value_heads=4, tie_word_embeddings=True
        ),
        "window_head_dim": dict(
            EXPERTS,
            intermediate_size=16,
            num_key_value_heads=1,
            head_dim=12,
            sliding_window=7,
            num_experts_per_tok=3,
        ),
    },
    "olmoe": {
        "plain": dict(EXPERTS, intermediate_size=24, num_key_value_heads=4),
        "gqa_renormalized": dict(EXPERTS, intermediate_size=24, norm_topk_prob=True),
        "mqa_bias_tied": dict(
            EXPERTS,
            intermediate_size=16,
            num_key_value_heads=1,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    },
    "qwen3_moe": {
        "head_dim": dict(
            EXPERTS,
            head_dim=16,
            intermediate_size=40,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            num_hidden_layers=3,
            mlp_only_layers=[0],
        ),
        "alternating": dict(
            EXPERTS,
            head_dim=8,
            num_key_value_heads=4,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_hidden_layers=4,
            decoder_sparse_step=2,
            attention_bias=True,
        ),
        "mqa_tied": dict(
            EXPERTS,
            head_dim=8,
            num_key_value_heads=1,
            moe_intermediate_size=16,
            tie_word_embeddings=True,
        ),
    },
    "qwen2_moe": {
        "gated_shared": dict(
            QWEN, shared_expert_intermediate_size=20, norm_topk_prob=True, tie_word_embeddings=True
        ),
        "mha_no_bias": dict(
            QWEN, shared_expert_intermediate_size=12, num_key_value_heads=4, qkv_bias=False
        ),
        "dense_first": dict(
            QWEN,
            shared_expert_intermediate_size=16,
            num_hidden_layers=3,
            mlp_only_layers=[0],
            num_key_value_heads=1,
        ),
    },
    "deepseek_v2": {
        "groups": dict(
            LATENT,
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            routed_scaling_factor=1.5,
        ),
        "lite": dict(LATENT, q_lora_rank=None, topk_method="greedy", n_shared_experts=1),
        "yarn": dict(
            LATENT,
            q_lora_rank=16,
            topk_method="greedy",
            n_shared_experts=2,
            rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=0.7),
        ),
    },
    "deepseek_v3": {
        "yarn": dict(
            LATENT,
            q_lora_rank=24,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
        ),
        "no_query_rank": dict(
            LATENT, q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, v_head_dim=20
        ),
        "no_renormalize": dict(
            LATENT,
            q_lora_rank=16,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            norm_topk_prob=False,
            tie_word_embeddings=True,
        ),
    },
    "glm4_moe": {
        "qk_norm": dict(GLM, use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5),
        "plain": dict(GLM, num_key_value_heads=4),
        "no_renormalize": dict(
            GLM, norm_topk_prob=False, n_group=2, topk_group=1, num_key_value_heads=1
        ),
    },
    "minimax_m2": {
        "partly_rotated": dict(EXPERTS, head_dim=16, intermediate_size=24, rotary_dim=8),
        "mha": dict(EXPERTS, head_dim=8, intermediate_size=24, num_key_value_heads=4),
        "mqa_tied": dict(
            EXPERTS,
            head_dim=12,
            intermediate_size=16,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
    },
    "ernie4_5_moe": {
        "shared": dict(ERNIE, moe_num_shared_experts=2),
        "no_shared_untied": dict(ERNIE, moe_num_shared_experts=0, tie_word_embeddings=False),
        "interval": dict(
            ERNIE,
            moe_num_shared_experts=1,
            num_hidden_layers=4,
            moe_layer_interval=2,
            num_key_value_heads=1,
        ),
    },
    "granitemoe": {
        "multipliers": dict(GRANITE, attention_multiplier=0.2, logits_scaling=2.0),
        "bias": dict(GRANITE, attention_bias=True, attention_multiplier=0.35),
        "tied": dict(
            GRANITE, attention_multiplier=0.5, tie_word_embeddings=True, num_key_value_heads=1
        ),
    },
    "phimoe": {
        "bias": dict(
            EXPERTS,
            intermediate_size=24,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.2,
        ),
        "window": dict(EXPERTS, intermediate_size=24, sliding_window=6, num_key_value_heads=4),
        "close_calls": dict(
            EXPERTS, intermediate_size=16, router_jitter_noise=0.4, num_key_value_heads=1
        ),
    },
    "gpt_oss": {
        "windows": dict(EXPERTS, head_dim=16, intermediate_size=24, sliding_window=6),
        "odd_mha": dict(
            EXPERTS,
            head_dim=8,
            intermediate_size=16,
            sliding_window=9,
            num_key_value_heads=4,
            num_hidden_layers=3,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        "cycle": dict(
            EXPERTS,
            head_dim=12,
            intermediate_size=16,
            sliding_window=5,
            num_key_value_heads=1,
            num_hidden_layers=4,
            num_experts_per_tok=4,
        ),
    },
    "llama4_text": {
        "rope_and_none": dict(LLAMA4, num_hidden_layers=4, no_rope_layer_interval=2),
        "alternating_experts": dict(
            LLAMA4,
            num_hidden_layers=4,
            interleave_moe_layer_step=2,
            use_qk_norm=False,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        "top2": dict(
            LLAMA4, num_experts_per_tok=2, num_key_value_heads=4, attn_temperature_tuning=False
        ),
    },
    "longcat_flash": {
        "zero_experts": dict(LONGCAT),
        "one_zero": dict(LONGCAT, zero_expert_num=1, moe_topk=2, num_hidden_layers=2),
        "wide": dict(LONGCAT, zero_expert_num=8, v_head_dim=12, routed_scaling_factor=1.5),
    },
}


# A cycle of layers, latents, experts without weights. Plain decoders: tests/serving/test_engine.py;
# experts with biases: tests/experts/test_quantize.py.
DECODED = ("longcat_flash",)


def parity_cases(by_default=tuple(SHAPES)):
    """pytest parameters, one per architecture and shape.

    Without --full only the first shapes of the architectures `by_default`.
    """
    params = []
    for model_type, shapes in SHAPES.items():
        for i, (shape, fields) in enumerate(shapes.items()):
            case = Case(model_type, shape, json.dumps(fields))
            marks = [] if i == 0 and model_type in by_default else [pytest.mark.full]
            params.append(pytest.param(case, id=str(case), marks=marks))
    return params
