"""Static description of a decoder."""

import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp

from moejax.core.errors import check
from moejax.layers.attention import AnyConfig, AttentionConfig
from moejax.layers.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """`num_layers` equal layers, scanned over. Exactly one of `moe` and `d_ff` says which MLP.

    Attributes:
        attention: None for the decoder's.
        shortcut: the layer has both MLPs, on the same input; what the experts give joins the
            residual stream after the next layer (LongCat-Flash, arXiv 2509.01322, section 2.1).
    """

    num_layers: int
    moe: MoEConfig | None = None
    d_ff: int = 0
    attention: AnyConfig | None = None
    shortcut: bool = False

    def __post_init__(self):
        check(self.num_layers >= 1, f"num_layers={self.num_layers} must be at least 1")
        check(
            (self.moe is None) == (self.d_ff > 0) if not self.shortcut else self.moe is not None,
            f"a layer group wants either moe or d_ff, got moe={self.moe} and d_ff={self.d_ff}",
        )
        check(
            not self.shortcut or (self.d_ff > 0 and self.num_layers == 1),
            f"a shortcut wants one layer with moe and d_ff, got num_layers={self.num_layers} and "
            f"d_ff={self.d_ff}",
        )
        check(
            self.moe is None or self.moe.router.causal,
            f"a decoder wants a causal gate, got {self.moe and self.moe.router.gate!r}: a token's "
            f"experts would depend on later tokens",
        )

    @property
    def layers(self) -> tuple["LayerGroup", ...]:
        """The layers, one group each."""
        return (dataclasses.replace(self, num_layers=1),) * self.num_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycle:
    """`repeats` times the layers of `groups`, scanned over: layers that alternate."""

    repeats: int
    groups: tuple[LayerGroup, ...]

    def __post_init__(self):
        check(self.repeats >= 1, f"repeats={self.repeats} must be at least 1")
        check(len(self.groups) >= 1, "a cycle wants at least one layer group")

    @property
    def layers(self) -> tuple[LayerGroup, ...]:
        """The layers, one group each."""
        return tuple(layer for group in self.groups for layer in group.layers) * self.repeats


AnyGroup: TypeAlias = LayerGroup | Cycle


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder-only transformer.

    Attributes:
        attention: of the layers that do not bring their own.
        norm: `rms`, or `layer` with mean and bias.
        residual_scale: of what attention and MLP add (Granite).
        logit_scale: of the logits.
        out_bias: the output projection has a bias.
    """

    vocab_size: int
    d_model: int
    attention: AnyConfig
    groups: tuple[AnyGroup, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    out_bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check(self.vocab_size >= 1, f"vocab_size={self.vocab_size} must be at least 1")
        check(self.d_model >= 1, f"d_model={self.d_model} must be at least 1")
        check(
            self.dtype in ("float32", "bfloat16"),
            f"dtype={self.dtype!r} is neither float32 nor bfloat16",
        )
        check(self.norm in ("rms", "layer"), f"norm={self.norm!r} is neither rms nor layer")
        check(len(self.groups) >= 1, "a decoder wants at least one layer group")
        layers = self.layers
        kept = {(layer.attention or self.attention).cache_dims for layer in layers}
        check(len(kept) == 1, f"layers differ in what they keep of a position: {sorted(kept)}")
        for layer, after in zip(layers, (*layers[1:], None), strict=True):
            check(
                not layer.shortcut or (after is not None and not after.shortcut),
                "a layer with a shortcut wants a layer without one behind it",
            )

    @property
    def layers(self) -> tuple[LayerGroup, ...]:
        """All layers in order, one group each."""
        return tuple(layer for group in self.groups for layer in group.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_moe_layers(self) -> int:
        return sum(layer.moe is not None for layer in self.layers)

    @property
    def moe(self) -> MoEConfig:
        """The MoE layers' config; raises when they differ or there are none."""
        kinds = {layer.moe for layer in self.layers if layer.moe}
        check(len(kinds) == 1, f"want one kind of MoE layer, this decoder has {len(kinds)}")
        (kind,) = kinds
        assert kind is not None
        return kind

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def group_layers(layers: list[LayerGroup]) -> tuple[AnyGroup, ...]:
    """The fewest groups that run `layers` (one layer each) in order.

    Runs of equal layers become a group; what then repeats becomes a cycle.

    >>> a, b = LayerGroup(num_layers=1, d_ff=4), LayerGroup(num_layers=1, d_ff=8)
    >>> [type(group).__name__ for group in group_layers([a, b, b, b, b])]
    ['LayerGroup', 'LayerGroup']
    >>> group_layers([a, b, b, a, b, b])[0].repeats
    2
    """
    runs = _runs(layers)
    for period in range(1, len(runs) // 2 + 1):
        repeats, rest = divmod(len(runs), period)
        if rest == 0 and runs == runs[:period] * repeats:
            return (Cycle(repeats=repeats, groups=tuple(runs[:period])),)
    if len(runs) > 2:  # leading layers of another kind, or a cycle cut short
        return (runs[0], *group_layers(layers[runs[0].num_layers :]))
    return tuple(runs)


def _runs(layers: list[LayerGroup]) -> list[LayerGroup]:
    """Equal neighbours as one group; a layer with a shortcut stays alone."""
    runs: list[LayerGroup] = []
    for layer in layers:
        if runs and runs[-1].layers[0] == layer and not layer.shortcut:
            runs[-1] = dataclasses.replace(layer, num_layers=runs[-1].num_layers + 1)
        else:
            runs.append(layer)
    return runs


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
