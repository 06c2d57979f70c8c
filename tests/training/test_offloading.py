"""Terms for offloading: by hand, on a mesh, in the checkpoint's config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint.config_json import to_json
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.models.decoder import Record
from moejax.routing.config import RouterConfig
from moejax.routing.gates import RouterParams
from moejax.training.config import TrainConfig
from moejax.training.loss import train_loss
from moejax.training.offloading import (
    OffloadingConfig,
    predictability_loss,
    sequence_balance_loss,
)
from moejax.training.run_log import RunLog, from_extra, to_extra
from moejax.training.sharding import sharded_loss
from moejax.training.state import init_state
from tests.training.helpers import tiny_model, tiny_train

BOTH = OffloadingConfig(predictability_weight=0.3, balance_over="sequence")


def recorded(topk_idx, logits, hidden):
    return Record(
        hidden=jnp.asarray(hidden, jnp.float32),
        topk_idx=jnp.asarray(topk_idx, jnp.int32),
        topk_weights=jnp.ones(np.shape(topk_idx), jnp.float32),
        router_logits=jnp.asarray(logits, jnp.float32),
    )


def test_predictability_by_hand():
    # Two layers, two tokens of two dims, three experts. Layer 1 chose 2 and 0.
    w_router = np.zeros((2, 2, 3), np.float32)
    w_router[1] = [[1, 2, 3], [0, 1, 0]]
    hidden = [[[1, 0], [0, 2]], [[9, 9], [9, 9]]]
    record = recorded([[[0], [1]], [[2], [0]]], np.zeros((2, 2, 3)), hidden)
    routers = RouterParams(w_router=jnp.asarray(w_router))
    want = np.mean([np.log(np.exp([1, 2, 3]).sum()) - 3, np.log(np.exp([0, 2, 0]).sum())])
    np.testing.assert_allclose(predictability_loss(record, routers), want, rtol=1e-6)
    # Last layer's input and first layer's router take no part, the rest learns.
    by_hidden = jax.grad(lambda h: predictability_loss(record.replace(hidden=h), routers))
    grad = by_hidden(record.hidden)
    assert (grad[1] == 0).all() and (jnp.abs(grad[0]).max(1) > 0).all()


def test_sequences_balance_by_themselves():
    # Each of two sequences uses one expert of its own: even as a batch, one-sided as sequences.
    idx = [[[0], [0], [1], [1]]]
    logits = np.zeros((1, 4, 2))
    logits[0, :2, 0] = logits[0, 2:, 1] = 50
    record = recorded(idx, logits, np.zeros((1, 4, 2)))
    cfg = RouterConfig(num_experts=2, top_k=1)
    np.testing.assert_allclose(sequence_balance_loss(record, cfg, 1), 1, rtol=1e-6)
    np.testing.assert_allclose(sequence_balance_loss(record, cfg, 2), 2, rtol=1e-6)


def test_terms_join_the_loss_and_do_not_depend_on_the_mesh():
    model, cfg = tiny_model(), tiny_train(batch_size=4, seq_len=4, offloading=BOTH)
    params = init_state(model, cfg).params
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 5)), jnp.int32)
    loss, metrics = jax.jit(train_loss, static_argnums=(2, 3))(params, tokens, model, cfg)
    want = metrics.cross_entropy + cfg.load_balancing_weight * metrics.load_balancing_loss
    want = want + 0.3 * metrics.predictability_loss
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert float(metrics.predictability_loss) > 0.5
    mesh = make_mesh(data=2, expert=2)
    there, same = jax.jit(sharded_loss, static_argnums=(2, 3, 4))(params, tokens, model, cfg, mesh)
    np.testing.assert_allclose(there, loss, rtol=1e-5)
    np.testing.assert_allclose(same.load_balancing_loss, metrics.load_balancing_loss, rtol=1e-5)


def test_checkpoints_without_the_terms_are_of_runs_without_them():
    model, cfg = tiny_model(), tiny_train()
    extra = json.loads(json.dumps(to_extra(RunLog(crc32=1), model, cfg)))
    del extra["train"]["offloading"]
    assert from_extra(extra, "here", 1, model, cfg).num_steps == 0
    other = dataclasses.replace(cfg, offloading=BOTH)
    with pytest.raises(InputError, match="is of another run, train: .*offloading"):
        from_extra(extra, "here", 1, model, other)
    assert to_json(other)["offloading"]["balance_over"] == "sequence"


def test_wrong_config():
    with pytest.raises(InputError, match="predictability_weight=-1"):
        OffloadingConfig(predictability_weight=-1)
    with pytest.raises(InputError, match="balance_over='world' is neither"):
        OffloadingConfig(balance_over="world")
    with pytest.raises(InputError, match="which fully_sharded splits"):
        TrainConfig(fully_sharded=True, offloading=BOTH)
