"""Static description of a decoder."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from moejax.core.errors import check
from moejax.layers.attention import AttentionConfig
from moejax.layers.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`num_layers` equal layers, scanned over. Exactly one of `moe` and `d_ff` says which MLP."""

    num_layers: int
    moe: MoEConfig | None = None
    d_ff: int = 0

    def __post_init__(self):
        check(self.num_layers >= 1, f"num_layers={self.num_layers} must be at least 1")
        check(
            (self.moe is None) == (self.d_ff > 0),
            f"a layer group wants either moe or d_ff, got moe={self.moe} and d_ff={self.d_ff}",
        )
        check(
            self.moe is None or self.moe.router.causal,
            f"a decoder wants a causal gate, got {self.moe and self.moe.router.gate!r}: a token's "
            f"experts would depend on later tokens",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder-only transformer."""

    vocab_size: int
    d_model: int
    attention: AttentionConfig
    groups: tuple[LayerGroup, ...]
    norm_eps: float = 1e-6
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check(self.vocab_size >= 1, f"vocab_size={self.vocab_size} must be at least 1")
        check(self.d_model >= 1, f"d_model={self.d_model} must be at least 1")
        check(
            self.dtype in ("float32", "bfloat16"),
            f"dtype={self.dtype!r} is neither float32 nor bfloat16",
        )
        check(len(self.groups) >= 1, "a decoder wants at least one layer group")

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.groups)

    @property
    def num_moe_layers(self) -> int:
        return sum(group.num_layers for group in self.groups if group.moe)

    @property
    def moe(self) -> MoEConfig:
        """The MoE layers' config; raises when they differ or there are none."""
        kinds = {group.moe for group in self.groups if group.moe}
        check(len(kinds) == 1, f"want one kind of MoE layer, this decoder has {len(kinds)}")
        (kind,) = kinds
        assert kind is not None
        return kind

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def moe_decoder(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    moe: MoEConfig,
    **rest,
) -> DecoderConfig:
    """The common case: every layer an equal MoE layer."""
    return DecoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        attention=AttentionConfig(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        ),
        groups=(LayerGroup(num_layers=num_layers, moe=moe),),
        **rest,
    )
