"""What is recorded layer by layer is what the model's own forward pass sees."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.shapes import tiny
from experiments.hidden_steps.states import check_equal_layers, record
from moejax.core.errors import InputError
from moejax.models.config import LayerGroup
from moejax.models.decoder import forward, init_decoder

CFG = tiny()


def test_record_equals_forward():
    params = init_decoder(jax.random.key(0), CFG)
    windows = np.random.default_rng(0).integers(0, CFG.vocab_size, (3, 8)).astype(np.int32)
    done = []
    routing, entering = record(params, CFG, windows, 2, lambda part, text: done.append(part))
    want = jax.jit(lambda p, t: forward(p, t, CFG).record)(params, windows)
    layers = CFG.num_moe_layers
    np.testing.assert_array_equal(
        routing.topk_idx.reshape(layers, 24, -1), np.asarray(want.topk_idx)
    )
    hidden = routing.activations.reshape(layers, 24, -1)
    np.testing.assert_allclose(hidden, want.hidden, rtol=1e-5, atol=1e-5)
    assert entering.shape == routing.activations.shape and done == [2 / 3, 1]
    # Layer 0 sees the embedding alone, normalised.
    embedded = np.asarray(params.embed)[windows] * CFG.embed_scale
    unit = embedded / np.sqrt((embedded**2).mean(-1, keepdims=True) + CFG.norm_eps)
    np.testing.assert_allclose(entering[0], unit, rtol=1e-4, atol=1e-5)


def test_other_layers_are_refused():
    mixed = dataclasses.replace(CFG, groups=(LayerGroup(num_layers=1, d_ff=8), *CFG.groups))
    with pytest.raises(InputError, match="wants a decoder of equal MoE layers"):
        check_equal_layers(mixed)
