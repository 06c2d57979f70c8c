"""A model that trains in milliseconds."""

import numpy as np

from moejax.layers.moe import MoEConfig
from moejax.models.config import DecoderConfig, moe_decoder
from moejax.routing.config import RouterConfig
from moejax.training.config import TrainConfig


def tiny_model(**rest) -> DecoderConfig:
    sizes = dict(vocab_size=256, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    experts = MoEConfig(d_ff=8, router=RouterConfig(num_experts=4, top_k=2))
    return moe_decoder(**sizes | dict(moe=experts) | rest)


def tiny_train(**rest) -> TrainConfig:
    return TrainConfig(
        **dict(batch_size=2, seq_len=4, horizon_steps=12, checkpoint_steps=4, learning_rate=1e-2)
        | rest
    )


def text_bytes() -> np.ndarray:
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200))
    return np.frombuffer(text.encode(), np.uint8)
