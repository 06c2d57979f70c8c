"""A byte-level mixture of experts on the Python standard library's source, 3.5 million parameters.

    python -m experiments.train --config=configs/byte_moe.py --workdir=workdir/byte_moe
    python -m experiments.train --config=configs/byte_moe.py --set mesh.expert=2 --set mesh.data=2

A small run for a CPU; a real one overrides sizes by `--set` or has a file of its own.
"""

from configs.model import ModelConfig
from configs.run import RunConfig
from moejax.routing.config import RouterConfig
from moejax.training.config import TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=4,
            d_model=128,
            d_ff=128,
            router=RouterConfig(num_experts=16, top_k=2),
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
        ),
        train=TrainConfig(horizon_steps=1000, checkpoint_steps=200),
    )
