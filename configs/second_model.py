"""A mixture of experts on four kinds of text in byte-pair tokens, 21 million parameters."""

from configs.model import ModelConfig
from configs.run import MeshConfig, RunConfig
from moejax.data.domains import DomainsConfig
from moejax.routing.config import RouterConfig
from moejax.training.config import TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        data=DomainsConfig(vocab_size=4096),
        model=ModelConfig(
            vocab_size=4096,
            num_layers=12,
            d_model=128,
            d_ff=64,
            router=RouterConfig(num_experts=64, top_k=6),
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
        ),
        mesh=MeshConfig(expert=2),
        train=TrainConfig(horizon_secs=2400.0, checkpoint_secs=300.0),
        eval_steps=500,
    )
