"""The compared runs differ in their loss and in nothing else."""

import dataclasses

from experiments.train_steps.offloadable import ARMS, arm_config
from moejax.training.config import TrainConfig


def test_arms_differ_in_their_loss_alone():
    base = arm_config(TrainConfig(), "batch_balance", 7)
    assert base == TrainConfig(horizon_steps=7)
    losses = ("offloading", "load_balancing_weight")
    arms = {name: arm_config(TrainConfig(), name, 7) for name in ARMS}
    assert len({*arms.values()}) == len(ARMS)
    for arm in arms.values():
        same = {name: getattr(base, name) for name in losses}
        assert dataclasses.replace(arm, **same) == base
    assert arms["predictable"].offloading.predictability_weight == 0.3
