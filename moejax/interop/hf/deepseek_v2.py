"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax routing inside the best groups."""

from typing import Any

from moejax.interop.hf.architecture import Architecture, leading_dense, read_decoder
from moejax.interop.hf.deepseek_v3 import read_moe, rules
from moejax.interop.hf.fields import Fields
from moejax.interop.hf.latent import read_latent
from moejax.models.config import DecoderConfig
from moejax.routing.config import RouterConfig


def read_config(fields: Fields) -> DecoderConfig:
    fields.activation()
    fields.want("mlp_bias", False)
    layers = leading_dense(fields, read_moe(fields, read_router(fields)))
    return read_decoder(fields, read_latent(fields), layers)


def read_router(fields: Fields) -> RouterConfig:
    """Section 2.1.3: a group scores its best expert; weights are scaled, never renormalised."""
    fields.want("scoring_func", "softmax")
    fields.want("norm_topk_prob", False)
    fields.want("topk_method", "greedy", "group_limited_greedy")
    groups: dict[str, Any] = {}
    if fields.text("topk_method", default="greedy") == "group_limited_greedy":
        groups = dict(num_groups=fields.integer("n_group"), top_groups=fields.integer("topk_group"))
    return RouterConfig(
        num_experts=fields.integer("n_routed_experts", "num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        renormalize=False,
        scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        **groups,
    )


ARCHITECTURE = Architecture(read_config=read_config, rules=rules)
