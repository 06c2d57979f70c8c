"""The model of `experiments/train.py` and of the quickstart, as knobs."""

import dataclasses
from typing import Literal

from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, moe_decoder
from moejax.routing.config import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder whose layers are all equal MoE layers, with any token-choice gate."""

    num_layers: int
    d_model: int
    d_ff: int  # of one expert
    router: RouterConfig
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 256
    shared_d_ff: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def decoder(self) -> DecoderConfig:
        """Raises `InputError` where the knobs do not fit together."""
        return moe_decoder(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            moe=MoEConfig(d_ff=self.d_ff, router=self.router, shared_d_ff=self.shared_d_ff),
            embed_scale=self.d_model**0.5,
            dtype=self.dtype,
        )
