"""One compiled step: the state keeps its types, and its gradient is that of the dense model."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.memory import nbytes
from moejax.experts import stage
from moejax.training.loss import train_loss
from moejax.training.state import init_state, train_step
from tests.training.helpers import text_bytes, tiny_model, tiny_train

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time


def test_step_is_stable_and_follows_the_dense_gradient():
    model, cfg = tiny_model(), tiny_train(warmup_fraction=0.0, weight_decay=0.0)
    state = init_state(model, cfg)
    types = jax.tree.map(jax.typeof, state)
    tokens = text_bytes()[:6].reshape(2, 3).astype(np.int32)

    def dense_loss(params):
        return train_loss(params, jnp.asarray(tokens), model, cfg, stage=stage.reference)[0]

    grad_fn = jax.jit(jax.value_and_grad(dense_loss), compiler_options=FAST)
    want_loss, want = grad_fn(state.params)
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(want)))
    before = jax.device_get(state.params)
    lowered = train_step.lower(state, tokens, np.float32(0), model=model, cfg=cfg)
    state, metrics = lowered.compile(FAST)(state, tokens, np.float32(0))
    assert jax.tree.map(jax.typeof, state) == types
    assert int(state.step) == 1
    np.testing.assert_allclose(metrics.loss, want_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    np.testing.assert_allclose(metrics.learning_rate, cfg.learning_rate, rtol=1e-6)
    # Adam's first step is lr * sign(gradient) wherever the gradient is not tiny.
    scale = min(1.0, cfg.clip_norm / norm)
    leaves = (jax.tree.leaves(tree) for tree in (before, state.params, want))
    for old, new, grad in zip(*leaves, strict=True):
        clear = np.abs(grad) * scale > 1e-5
        np.testing.assert_allclose(
            (old - new)[clear], cfg.learning_rate * np.sign(grad)[clear], rtol=2e-2
        )


def test_optimizer_state_is_two_copies_of_the_weights():
    state = jax.eval_shape(lambda: init_state(tiny_model(), tiny_train()))
    assert nbytes(state.opt_state) == 2 * nbytes(state.params) + 4
