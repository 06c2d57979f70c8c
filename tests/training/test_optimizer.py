"""The schedule at its corners, and one update against AdamW written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.layers.moe import MoEConfig
from moejax.models.decoder import init_decoder
from moejax.routing.config import RouterConfig
from moejax.training.config import TrainConfig
from moejax.training.optimizer import decayed, learning_rate, make_optimizer
from tests.training.helpers import tiny_model


@pytest.mark.parametrize(
    "progress,share", [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2), (1.5, 0.2)]
)
def test_learning_rate_rises_and_falls_with_progress(progress, share):
    cfg = TrainConfig(learning_rate=3e-3, warmup_fraction=0.1, final_fraction=0.2)
    lr = learning_rate(jnp.float32(progress), cfg)
    assert lr.dtype == jnp.float32
    assert float(lr) == pytest.approx(3e-3 * share, abs=1e-9)


def test_learning_rate_without_warmup_starts_at_the_peak():
    cfg = TrainConfig(learning_rate=1e-2, warmup_fraction=0.0)
    assert float(learning_rate(jnp.float32(0), cfg)) == pytest.approx(1e-2)


def test_update_is_clipped_adamw():
    cfg = TrainConfig(clip_norm=1.0, weight_decay=0.1)
    params = {"w_q": jnp.full((2, 2), 2.0), "final_norm": jnp.ones((2,))}
    grads = {"w_q": jnp.full((2, 2), 3.0), "final_norm": jnp.full((2,), -3.0)}
    optimizer = make_optimizer(cfg)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    clipped = 3.0 / np.sqrt(6 * 9.0)
    # After one step the moments, corrected for bias, are the gradient and its square.
    adam = clipped / (clipped + cfg.eps)
    np.testing.assert_allclose(updates["w_q"], adam + 0.1 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(updates["final_norm"], -adam, rtol=1e-5)


def test_norms_biases_and_temperatures_are_not_decayed_though_stacked():
    router = RouterConfig(num_experts=4, top_k=2, bias=True, correction_bias=True, projection_dim=4)
    model = tiny_model(moe=MoEConfig(d_ff=8, router=router))
    shapes = jax.eval_shape(lambda: init_decoder(jax.random.key(0), model))
    mask = decayed(shapes)
    layer = mask.groups[0]
    assert not (layer.attention_norm or layer.mlp_norm or mask.final_norm)
    gate = layer.mlp.router
    assert not (gate.correction_bias or gate.b_router or gate.temperature)
    assert all(jax.tree.leaves((layer.mlp.experts, layer.attention)))
    assert mask.embed and mask.w_out and gate.w_router and gate.w_project


@pytest.mark.parametrize(
    "field",
    [
        dict(batch_size=0),
        dict(seq_len=0),
        dict(horizon_secs=0.0),
        dict(horizon_steps=0),
        dict(checkpoint_secs=-1.0),
        dict(checkpoint_steps=0),
        dict(learning_rate=0.0),
        dict(b2=1.0),
        dict(warmup_fraction=1.0),
        dict(final_fraction=1.5),
        dict(weight_decay=-0.1),
        dict(seed=-1),
    ],
)
def test_refuses_wrong_configs(field):
    ((name, value),) = field.items()
    with pytest.raises(InputError, match=f"{name}={value} "):
        TrainConfig(**field)
