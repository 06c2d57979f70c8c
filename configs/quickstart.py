"""The quickstart's model and training: a byte-level mixture of experts on Python source.

    ./scripts/quickstart.sh
    ./scripts/quickstart.sh --set train.horizon_secs=60 --set model.num_experts=64

Expected of the training step on two CPU cores: 10.5 million parameters, 500 to 600 steps of 1024
bytes, held-out bits per byte 0.63 to 0.65 of the bigram's, below the trigram's (3.54 and 2.67 on 30
MB of standard library; 700 steps gave 0.61).
"""

import dataclasses

from moejax.data.text import TextConfig
from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, moe_decoder
from moejax.predictors.config import FitConfig, PredictConfig
from moejax.routing.config import RouterConfig
from moejax.serving.config import DecodeConfig
from moejax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The knobs of the quickstart's decoder; every layer is an equal MoE layer."""

    num_layers: int = 6
    d_model: int = 128
    d_ff: int = 136  # of one expert; 128 would stay below ten million parameters
    num_experts: int = 32
    top_k: int = 4
    num_heads: int = 2  # two of 64 cost less than four of 32: softmax dominates on CPU
    head_dim: int = 64

    def decoder(self) -> DecoderConfig:
        """The decoder over bytes; raises `InputError` where the knobs do not fit together."""
        router = RouterConfig(num_experts=self.num_experts, top_k=self.top_k)
        return moe_decoder(
            vocab_size=256,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            moe=MoEConfig(d_ff=self.d_ff, router=router),
            embed_scale=self.d_model**0.5,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Everything that `--set` reaches.

    Attributes:
        eval_bytes: held-out bytes scored; a sample, because scoring all would take minutes.
        eval_batch_size: sequences scored at a time.
    """

    data: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig(horizon_secs=198.0, checkpoint_secs=60.0)
    eval_bytes: int = 64 * 1024
    eval_batch_size: int = 16
    predict: PredictConfig = PredictConfig(fit=FitConfig(horizon_secs=4.0))
    decode: DecodeConfig = DecodeConfig(new_tokens=(128, 32))


def get_config() -> QuickstartConfig:
    return QuickstartConfig()
