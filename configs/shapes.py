"""Model shapes that benchmarks name, by total parameters."""

from moejax.core.errors import InputError
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, moe_decoder
from moejax.routing.config import RouterConfig


def olmoe_400m() -> DecoderConfig:
    """OLMoE-1B-7B (arXiv 2409.02060) with model and expert widths divided by four: 420M."""
    return moe_decoder(
        vocab_size=256,
        d_model=512,
        num_layers=16,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        moe=MoEConfig(d_ff=256, router=RouterConfig(num_experts=64, top_k=8, renormalize=False)),
    )


def mixtral_8x7b() -> DecoderConfig:
    """Mixtral 8x7B (arXiv 2401.04088, table 1): 46.7B, 90 GB in bfloat16."""
    return moe_decoder(
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        moe=MoEConfig(d_ff=14336, router=RouterConfig(num_experts=8, top_k=2)),
    )


def tiny() -> DecoderConfig:
    """The smallest model with every feature of the benchmarks, for their tests."""
    return moe_decoder(
        vocab_size=64,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        moe=MoEConfig(d_ff=24, router=RouterConfig(num_experts=8, top_k=2)),
    )


SHAPES = {"olmoe-400m": olmoe_400m, "mixtral-8x7b": mixtral_8x7b, "tiny": tiny}


def get_shape(name: str) -> DecoderConfig:
    """The config called `name`; raises `InputError` that lists the known ones."""
    if name not in SHAPES:
        raise InputError(f"shape {name!r} is not one of {sorted(SHAPES)}")
    return SHAPES[name]()
