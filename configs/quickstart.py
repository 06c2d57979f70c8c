"""The quickstart's model and training: a byte-level mixture of experts on Python source.

    ./scripts/quickstart.sh
    ./scripts/quickstart.sh --set train.horizon_secs=60 --set model.router.num_experts=64

Expected of the training step on two CPU cores: 10.5 million parameters, 500 to 600 steps of 1024
bytes, held-out bits per byte 0.63 to 0.65 of the bigram's, below the trigram's (3.54 and 2.67 on 30
MB of standard library; 700 steps gave 0.61).
"""

import dataclasses

from configs.model import ModelConfig
from moejax.data.text import TextConfig
from moejax.predictors.config import FitConfig, PredictConfig
from moejax.routing.config import RouterConfig
from moejax.serving.config import DecodeConfig
from moejax.training.config import TrainConfig

MODEL = ModelConfig(
    num_layers=6,
    d_model=128,
    d_ff=136,  # 128 would stay below ten million parameters
    router=RouterConfig(num_experts=32, top_k=4),
    # Two of 64 cost less than four of 32: softmax dominates on CPU.
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Everything that `--set` reaches.

    Attributes:
        eval_bytes: held-out bytes scored; a sample, because scoring all would take minutes.
        eval_batch_size: sequences scored at a time.
    """

    data: TextConfig = TextConfig()
    model: ModelConfig = MODEL
    train: TrainConfig = TrainConfig(horizon_secs=198.0, checkpoint_secs=60.0)
    eval_bytes: int = 64 * 1024
    eval_batch_size: int = 16
    predict: PredictConfig = PredictConfig(fit=FitConfig(horizon_secs=4.0))
    decode: DecodeConfig = DecodeConfig(new_tokens=(128, 32))


def get_config() -> QuickstartConfig:
    return QuickstartConfig()
