"""LLaPor: which layers get which net, and the same scores by layer, traced, and all at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import llapor
from moejax.predictors.kinds import KINDS
from moejax.predictors.llapor import LlaporConfig, layer_groups
from moejax.predictors.pca import fit_compression
from tests.predictors.test_kinds import SIZES
from tests.predictors.test_scorers import noisy


@pytest.fixture(scope="module")
def params():
    """Five layers: four predict, one near each end."""
    return noisy(partial(KINDS["llapor"].init, **SIZES["llapor"]))


def test_groups_cover_the_predicting_layers():
    for layers in range(4, 40):
        groups = layer_groups(layers)
        assert [i for group in groups.values() for i in group] == [*range(layers - 1)]
        assert len(groups["input"]) == len(groups["output"]) >= 1 and len(groups["middle"]) >= 1
    with pytest.raises(InputError, match="want num_layers >= 4, got 3"):
        layer_groups(3)


def test_scores_by_layer_equal_all_at_once(params):
    hidden = jax.random.normal(jax.random.key(0), (4, 3, 6))
    want = jax.jit(llapor.all_scores)(params, hidden)
    ask = jax.jit(llapor.scores)
    for layer in range(4):
        got = ask(params, jnp.int32(layer), hidden[layer])
        np.testing.assert_allclose(got, want[layer], rtol=1e-5, atol=1e-6)
    assert ask(params, jnp.int32(4), hidden[0]).shape == (3, 8)  # the last layer's mean nothing
    edge, middle = jnp.abs(want[0] - want[3]).max(), jnp.abs(want[1] - want[2]).max()
    assert edge > 1e-3 and middle > 1e-3  # no two layers share a net


def test_the_gate_shuts_the_second_block(params):
    net = jax.tree.map(lambda p: p[0], params.middle)
    a = jax.random.normal(jax.random.key(0), (3, 3))
    shut = net.replace(w_gate=jnp.zeros_like(net.w_gate), b_gate=jnp.full_like(net.b_gate, -1e9))
    first = jax.nn.gelu(a @ net.w_in + net.b_in[None]) @ net.w_out + net.b_out[None]
    first = first + a @ net.w_linear
    np.testing.assert_allclose(llapor.gated_scores(shut, a), first, rtol=1e-5, atol=1e-6)
    assert jnp.abs(llapor.gated_scores(net, a) - first).max() > 1e-3


def test_an_unfitted_predictor_has_no_favourites():
    params = KINDS["llapor"].init(jax.random.key(0), **SIZES["llapor"])
    hidden = jnp.ones((4, 3, 6))
    np.testing.assert_array_equal(llapor.all_scores(params, hidden), np.zeros((4, 3, 8)))


def test_it_can_start_as_the_next_gate():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 50, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    router = rng.normal(size=(5, 6, 8)).astype(np.float32)
    full, _ = fit_compression(hidden, 6)
    edge = jax.tree.map(lambda p: p[np.array([0, 3])], full)
    deep = jax.tree.map(lambda p: p[1:3], full)
    params = llapor.init_llapor(jax.random.key(0), edge, deep, LlaporConfig(), num_experts=8)
    params = llapor.start_from_routers(params, router)
    want = np.einsum("ltd,lde->lte", hidden, router[1:])
    scores = np.asarray(llapor.all_scores(params, hidden))
    np.testing.assert_allclose(scores, want, rtol=1e-3, atol=1e-3)
    moved = np.asarray(llapor.all_scores(llapor.centre(params, hidden, 2), hidden))
    offset = (scores - moved)[:, :1, :1]
    np.testing.assert_allclose(moved + offset, scores, rtol=1e-4, atol=1e-4)
    second, third = np.sort(moved, axis=-1)[..., [-2, -3]].transpose(2, 0, 1)
    np.testing.assert_allclose(np.median((second + third) / 2, axis=1), 0, atol=1e-4)


@pytest.mark.parametrize("wrong", [dict(edge_components=0), dict(focal=-1.0), dict(balance=-1.0)])
def test_wrong_config(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        LlaporConfig(**wrong)
