"""Quantised experts: how near they are, and that every way of serving them agrees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.memory import device_sharding, memory_kinds
from moejax.core.mesh import make_mesh
from moejax.experts.gated import every_expert, init_experts
from moejax.experts.quantize import abstract_quantized, quantize_experts, quantize_matrix
from moejax.experts.stage import stacked
from moejax.kernels.quantized import FORMATS, dequantize_tree
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import init_decoder
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import expert_bytes, to_device, to_host
from moejax.routing.config import RouterConfig
from moejax.serving.engine import make_engine, split_experts
from moejax.serving.prediction import next_gate
from tests.exact import exact_jit
from tests.experts.cases import normal, routing_of

L, E, D, F = 2, 4, 128, 192
# Bits per weight, and relative root-mean-square errors of weights and of outputs of normal experts.
EXPECTED = {
    "int8": (8 + 32 / D, 8 + 32 / F, 0.008, 0.012),
    "int4": (4.5, 4.5, 0.100, 0.160),
    "fp8": (8.25, 8 + 32 / 96, 0.028, 0.045),
}


@functools.cache
def experts():
    return init_experts(jax.random.key(0), (L, E), D, F, out_scale=1.0, dtype=jnp.float32)


def relative_error(got, want):
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_errors_and_a_second_time(format):
    bits, bits_down, of_weights, of_outputs = EXPECTED[format]
    quantized = quantize_experts(experts(), format)
    assert expert_bytes(quantized) == (2 * bits + bits_down) * D * F / 8
    assert quantized.w_down.shape == experts().w_down.shape
    stood_for = dequantize_tree(quantized, jnp.float32)
    for got, want in zip(jax.tree.leaves(stood_for), jax.tree.leaves(experts()), strict=True):
        assert of_weights / 1.3 < relative_error(got, want) < of_weights
    x = normal(1, 5, D)
    idx = np.asarray([[0, 1], [2, 3], [1, 2], [3, 0], [2, 0]])
    of_layer = functools.partial(jax.tree.map, lambda leaf: leaf[1])
    outputs = [
        every_expert(of_layer(weights), x, routing_of(idx)) for weights in (quantized, experts())
    ]
    error = relative_error(*outputs)
    assert of_outputs / 1.3 < error < of_outputs, error
    again = quantize_experts(stood_for, format)
    np.testing.assert_array_equal(again.w_up.q, quantized.w_up.q)
    np.testing.assert_allclose(again.w_up.scale, quantized.w_up.scale, rtol=1.2e-7, atol=0)


def test_whole_numbers_come_back_bit_for_bit():
    """-8 .. 7 in steps of a scale that is no power of two, and a column of zeros."""
    steps = np.tile(np.arange(-8, 8, dtype=np.float32), 4)[:, None]
    matrix = np.concatenate([steps * np.float32(0.3), -steps * np.float32(7.7), 0 * steps], axis=1)
    _, scale = quantize_matrix(matrix, "int4")
    np.testing.assert_array_equal(scale, np.float32([[0.3, -7.7, 0]]))
    for format in ("int4", "int8"):
        q, scale = quantize_matrix(matrix, format)
        assert not q[:, 2].any() and not scale.reshape(-1, 3)[:, 2].any()


def test_blocks_of_an_fp8_checkpoint_come_back():
    """Values e4m3 and scales per 128 x 128, as DeepSeek-V3 has them, through float32 and back."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(256, 384)).astype(np.float32)
    for block in np.ndindex(2, 3):
        part = values[128 * block[0] :][:128, 128 * block[1] :][:, :128]
        part *= 448 / np.abs(part).max()
    values = values.astype(jnp.float8_e4m3fn)
    scales = rng.uniform(1e-4, 1e-2, (2, 3)).astype(np.float32)
    wide = np.repeat(scales, 128, axis=1)
    matrix = values.astype(np.float32) * np.repeat(wide, 128, axis=0)
    q, scale = quantize_matrix(matrix, "fp8")
    np.testing.assert_allclose(scale.reshape(2, 384), wide, rtol=1.2e-7, atol=0)
    planes = np.stack([(q.view(np.uint32) >> (8 * p) & 255).reshape(2, 32, 384) for p in range(4)])
    bits = planes.swapaxes(0, 1).reshape(256, 384).astype(np.uint8)
    np.testing.assert_array_equal(bits, values.view(np.uint8))


def test_memory_shards_and_shapes_are_kept():
    mesh, alone = make_mesh(data=2, expert=2), quantize_experts(experts(), "int4")
    for place in (to_host, to_device):
        source = place(experts(), mesh)
        quantized = quantize_experts(source, "int4")
        assert memory_kinds(quantized) == memory_kinds(source)
        jax.tree.map(np.testing.assert_array_equal, quantized, alone)
        abstract = abstract_quantized(
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), source
            ),
            "int4",
        )
        for got, want in zip(jax.tree.leaves(quantized), jax.tree.leaves(abstract), strict=True):
            assert (got.shape, got.dtype, got.sharding) == (want.shape, want.dtype, want.sharding)


@pytest.mark.parametrize(
    "format, shape, message",
    [
        ("int2", (8, 8), "expert format 'int2' is not one of int8, int4, fp8"),
        ("int4", (12, 8), "w_gate: 12 rows are not a multiple of 8, the int4 values of a word"),
        ("int8", (6, 8), "w_gate: 6 rows are not a multiple of 4, the int8 values of a word"),
    ],
)
def test_refused(format, shape, message):
    weights = init_experts(jax.random.key(0), (2,), *shape, out_scale=1.0, dtype=jnp.float32)
    with pytest.raises(InputError) as error:
        quantize_experts(weights, format)
    assert str(error.value) == message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(format, bad):
    matrix = normal(0, 64, 4)
    matrix[3, 2] = bad
    with pytest.raises(InputError, match="w: [14] of 4 groups of weights hold NaN or infinite"):
        quantize_matrix(matrix, format, "w")


def test_matrices_cut_over_devices_are_refused():
    cut = device_sharding(make_mesh(model=2), P(None, None, "model"))
    with pytest.raises(InputError, match=r"w_gate: matrices of shape \(128, 192\) are cut over"):
        quantize_experts(jax.device_put(experts(), cut), "int8")


@pytest.mark.parametrize("format", ["int4", pytest.param("fp8", marks=pytest.mark.full)])
def test_offloaded_bits_equal_resident_ones(format):
    """With biases, through a cache of too few slots; and near the product of what is stood for."""
    weights = init_experts(jax.random.key(2), (L, 8), 16, 24, out_scale=1.0, dtype=jnp.float32)
    biases = dict(b_gate=normal(3, L, 8, 24), b_up=normal(4, L, 8, 24), b_down=normal(5, L, 8, 16))
    biases = {name: jnp.asarray(array) for name, array in biases.items()}
    quantized = quantize_experts(dataclasses.replace(weights, **biases), format)
    cfg, store = OffloadConfig(num_slots=4), to_host(quantized, make_mesh())

    @exact_jit
    def both(store, experts, x, routing, layer, state):
        ours, state, counts = offloaded(store, cfg)(x, routing, None, layer, state)
        theirs, _, _ = stacked(experts)(x, routing, None, layer, None)
        return ours, theirs, state, counts

    state, rng = init_state(store, cfg), np.random.default_rng(1)
    for call in range(5):
        idx = np.stack([rng.choice(8, 3, replace=False) for _ in range(2)])
        x, layer = normal(call, 2, 16), call % L
        args = x, routing_of(idx), jnp.int32(layer), state
        ours, theirs, state, counts = both(store, quantized, *args)
        np.testing.assert_array_equal(ours, theirs)
        assert int(counts.demand_fetches) > 0 or call > 1
    dense = jax.tree.map(lambda leaf: leaf[layer], dequantize_tree(quantized, jnp.float32))
    want = every_expert(dense, x, routing_of(idx))
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max())


CFG = moe_decoder(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(d_ff=24, router=RouterConfig(num_experts=8, top_k=2)),
)


def decode(params, experts, *, ranks=1, offload=None):
    """Tokens [n, B] and experts fetched by demand."""
    mesh = make_mesh(expert=ranks)
    experts = (to_host if offload else to_device)(experts, mesh)
    prediction = next_gate(params, CFG) if offload else None
    engine = make_engine(
        params, experts, CFG, mesh, capacity=12, offload=offload, prediction=prediction
    )
    prompts = jax.random.randint(jax.random.key(4), (2, 2), 0, 32, dtype=jnp.int32)
    session, token, _ = engine.prefill(engine.start(2), prompts, jnp.ones_like(prompts, bool))
    tokens, fetched = [token], 0
    for _ in range(6):
        session, token, metrics = engine.step(session)
        tokens.append(token)
        fetched += int(metrics.demand_fetches.sum())
    return np.stack(tokens), fetched


def test_engines_decode_the_same_tokens_resident_and_sharded_offloaded():
    params, experts = split_experts(init_decoder(jax.random.key(3), CFG), CFG)
    quantized = quantize_experts(experts, "int8")  # rows go one at a time: few compile fast
    tokens, _ = decode(params, quantized)
    same, fetched = decode(
        params, quantized, ranks=2, offload=OffloadConfig(num_slots=4, prefetch_lanes=1)
    )
    np.testing.assert_array_equal(same, tokens)
    assert fetched > 0
