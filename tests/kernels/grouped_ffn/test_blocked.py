"""The blocked gated MLP against the reference, in value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.kernels.chunks import pick_sizes, plan_chunks, zero_tail
from moejax.kernels.grouped_ffn import GatedWeights, blocked, reference, run_chunks
from tests.exact import exact_jit
from tests.kernels.cases import (
    NUM_GROUPS,
    NUM_ROWS,
    SIZES,
    SKEWED,
    assert_close,
    empty_patterns,
    normal,
    value_and_grads,
)

D, F = 8, 12
blocked_ffn = functools.partial(blocked.grouped_ffn, sizes=SIZES)


@functools.cache
def compiled(dtype=jnp.float32):
    return [value_and_grads(ffn) for ffn in (blocked_ffn, reference.grouped_ffn)]


def operands(key, dtype=jnp.float32, groups=NUM_GROUPS, rows=NUM_ROWS):
    xs, gate, up, down, ct = normal(
        key, (rows, D), (groups, D, F), (groups, D, F), (groups, F, D), (rows, D), dtype=dtype
    )
    return xs, GatedWeights(w_gate=gate, w_up=up, w_down=down), ct


def test_every_pattern_of_empty_groups(key):
    xs, weights, ct = operands(key)
    fast, slow = compiled()
    for group_sizes in empty_patterns():
        got = jax.device_get(fast((xs, weights), group_sizes, ct))
        assert_close(got, slow((xs, weights), group_sizes, ct))
        used = int(group_sizes.sum())
        value, (d_xs, d_weights) = got
        assert not np.any(value[used:]) and not np.any(d_xs[used:])
        assert not any(np.any(d[group_sizes == 0]) for d in jax.tree.leaves(d_weights))


@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_skewed(key, name, dtype):
    xs, weights, ct = operands(key, dtype)
    group_sizes = jnp.asarray(SKEWED[name], jnp.int32)
    got, want = (run((xs, weights), group_sizes, ct) for run in compiled())
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
    # Sums are in float32 either way; saved gate and up rows and the results are rounded to bf16.
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 2e-2)


def test_mixed_dtypes_and_other_activation(key):
    xs, weights, ct = operands(key)
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    group_sizes = jnp.asarray(SKEWED["first_is_large"], jnp.int32)
    other = weights.replace(activation="gelu_tanh")
    got, want = (run((xs, other), group_sizes, ct) for run in compiled())
    assert got[0].dtype == jnp.float32
    assert_close(got[0], want[0])
    assert_close(got[1], want[1], 1e-2)
    silu = compiled()[0]((xs, weights), group_sizes, ct)[0]
    assert np.abs(silu - got[0]).max() > 1e-3


def test_biases_and_clamped_swiglu(key):
    """gpt-oss: large rows, so that both clamps act."""
    xs, weights, ct = operands(key)
    b_gate, b_up, b_down = normal(key, (NUM_GROUPS, F), (NUM_GROUPS, F), (NUM_GROUPS, D))
    weights = weights.replace(b_gate=b_gate, b_up=b_up, b_down=b_down, activation="clamped_swiglu")
    group_sizes = jnp.asarray(SKEWED["first_is_large"], jnp.int32)
    got, want = (run((4 * xs, weights), group_sizes, ct) for run in compiled())
    assert_close(got, want)
    x, w = 4 * np.asarray(xs[0]), jax.tree.map(lambda leaf: np.asarray(leaf[0]), weights)
    gate, up = x @ w.w_gate + w.b_gate, x @ w.w_up + w.b_up
    assert gate.max() > 7 and np.abs(up).max() > 7
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    np.testing.assert_allclose(got[0][0], hidden @ w.w_down + w.b_down, rtol=1e-4)


@pytest.mark.parametrize("sizes", [None, (1,), (3,)])
def test_any_chunk_sizes(key, sizes):
    xs, weights, ct = operands(key)
    group_sizes = jnp.asarray(SKEWED["last_is_large"], jnp.int32)
    run = value_and_grads(functools.partial(blocked.grouped_ffn, sizes=sizes))
    assert_close(run((xs, weights), group_sizes, ct), compiled()[1]((xs, weights), group_sizes, ct))


def test_group_rows_pick_rows_of_the_stack(key):
    xs, weights, ct = operands(key)
    group_sizes = jnp.asarray([4, 0, 9, 2], jnp.int32)
    rows = jnp.asarray([5, 1, 0, 5], jnp.int32)  # two groups share a row
    got, want = (
        value_and_grads(functools.partial(ffn, group_rows=rows))((xs, weights), group_sizes, ct)
        for ffn in (blocked_ffn, reference.grouped_ffn)
    )
    assert_close(got, want)


def test_vmap(key):
    xs, weights, ct = operands(key)
    patterns = jnp.asarray(list(SKEWED.values()), jnp.int32)
    many = jnp.stack([xs + i for i in range(len(SKEWED))])
    got, want = (
        jax.jit(jax.vmap(run, ((0, None), 0, None)))((many, weights), patterns, ct)
        for run in compiled()
    )
    assert_close(got, want)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_shard_map_over_experts(key, axis_type):
    """Each rank computes its experts' rows of replicated xs; checks of varying axes stay on."""
    xs, weights, ct = operands(key)
    group_sizes = jnp.asarray([3, 0, 9, 2, 5, 1, 0, 4], jnp.int32)
    mesh = make_mesh(expert=2, axis_type=axis_type)
    specs = GatedWeights(w_gate=P("expert"), w_up=P("expert"), w_down=P("expert"))

    @jax.shard_map(mesh=mesh, in_specs=(P(), specs, P("expert")), out_specs=P())
    def sharded(xs, weights, group_sizes):
        mine = jax.lax.axis_index("expert") == 1
        first = jnp.where(mine, 14, 0)  # rows of the first rank
        y = blocked_ffn(jnp.roll(xs, -first, axis=0), weights, group_sizes)
        return jax.lax.psum(jnp.roll(y, first, axis=0), "expert")

    want = compiled()[1]((xs, weights), group_sizes, ct)
    by_expert = NamedSharding(mesh, P("expert"))
    weights, group_sizes = jax.device_put((weights, group_sizes), by_expert)
    xs, ct = jax.device_put((xs, ct), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        assert_close(value_and_grads(sharded)((xs, weights), group_sizes, ct), want)


def test_non_finite_rows_stay_with_their_expert(key):
    xs, weights, ct = operands(key)
    group_sizes = jnp.asarray([3, 5, 2, 6, 0, 0, 0, 0], jnp.int32)
    run, _ = compiled()
    clean = run((xs, weights), group_sizes, ct)
    for bad in (jnp.inf, jnp.nan):
        dirty = run((xs.at[5].set(bad).at[20].set(bad), weights), group_sizes, ct)
        others = np.asarray([0, 2, 3])
        for a, b in zip(jax.tree.leaves(clean[1][1]), jax.tree.leaves(dirty[1][1]), strict=True):
            np.testing.assert_array_equal(a[others], b[others])
            assert not np.isfinite(b[1]).all()
        keep = np.asarray([r for r in range(NUM_ROWS) if r != 5])
        np.testing.assert_array_equal(clean[0][keep], dirty[0][keep])
        np.testing.assert_array_equal(clean[1][0][keep], dirty[1][0][keep])


@functools.partial(exact_jit, static_argnames="sizes")
def run_in_two_calls(xs, stack, group_sizes, group_rows, cut, *, sizes):
    plan = plan_chunks(group_sizes, sizes=sizes, num_rows=xs.shape[0])
    padded = jnp.pad(xs, ((0, sizes[-1]), (0, 0)))
    run = functools.partial(run_chunks, sizes=sizes)
    y = run(jnp.zeros_like(padded), padded, stack, group_rows, plan, 0, cut)
    y = run(y, padded, stack, group_rows, plan, cut, plan.num_chunks)
    return zero_tail(y, jnp.sum(group_sizes), sizes=sizes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [8, 100])
def test_bits_depend_on_the_rows_and_weights_alone(key, dtype, rows):
    """Groups in another order, weights elsewhere in a larger stack, other calls: same bits."""
    groups, slots, d, f = 5, 9, 64, 48
    draw = np.random.default_rng(0)
    group_sizes = np.asarray([1, 0, 4, 2, 1] if rows == 8 else [30, 3, 0, 17, 48], np.int32)
    starts = np.cumsum(group_sizes) - group_sizes
    xs, gate, up, down = normal(
        key, (rows, d), (groups, d, f), (groups, d, f), (groups, f, d), dtype=dtype
    )
    weights = GatedWeights(w_gate=gate, w_up=up, w_down=down)

    def run(order, slot_of, cut):
        """Rows of the result, back in the first order."""
        take = np.concatenate([starts[g] + np.arange(group_sizes[g]) for g in order])
        rest = np.setdiff1d(np.arange(rows), take)
        index = np.concatenate([take, rest])

        def spread(w):
            return jnp.full((slots, *w.shape[1:]), jnp.nan, dtype).at[slot_of].set(w)

        y = run_in_two_calls(
            xs[index],
            jax.tree.map(spread, weights),
            group_sizes[order],
            np.asarray(slot_of[order], np.int32),
            cut,
            sizes=pick_sizes(rows),
        )
        assert not np.any(np.asarray(y[len(take) :], np.float32))
        return np.asarray(y, np.float32)[np.argsort(index)]

    plain = run(np.arange(groups), np.arange(groups), 0)
    for cut in (1, 2, 3):
        moved = run(draw.permutation(groups), draw.permutation(slots)[:groups], cut)
        np.testing.assert_array_equal(moved, plain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
@pytest.mark.parametrize("tokens", [4, 12])
def test_a_carried_cache_is_never_copied(dtype, tokens):
    """The stack is the carry of an outer scan that also writes to it, as a slot cache is."""
    slots, d, f, steps = 37, 24, 40, 5
    sizes = pick_sizes(tokens)

    def step(cache, inputs):
        xs, group_sizes, group_rows, slot, new = inputs
        # Write phase before read phase.
        cache = jax.tree.map(lambda c, n: lax.dynamic_update_slice(c, n, (slot, 0, 0)), cache, new)
        plan = plan_chunks(group_sizes, sizes=sizes, num_rows=tokens)
        padded = jnp.pad(xs, ((0, sizes[-1]), (0, 0)))
        y = jnp.zeros_like(padded)
        return cache, run_chunks(
            y, padded, cache, group_rows, plan, 0, plan.num_chunks, sizes=sizes
        )

    def stack(*lead):
        shapes = {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d)}
        return GatedWeights(
            **{n: jax.ShapeDtypeStruct((*lead, *s), dtype) for n, s in shapes.items()}
        )

    ids = jax.ShapeDtypeStruct((steps, 8), jnp.int32)
    xs = jax.ShapeDtypeStruct((steps, tokens, d), jnp.float32)
    slot = jax.ShapeDtypeStruct((steps,), jnp.int32)
    run = jax.jit(lambda cache, inputs: lax.scan(step, cache, inputs), donate_argnums=0)
    text = run.lower(stack(slots), (xs, ids, ids, slot, stack(steps, 1))).compile().as_text()
    free = {"parameter", "get-tuple-element", "bitcast"}
    assert whole_stack_ops(text) - free == {"in-place update"}


def whole_stack_ops(text: str) -> set[str]:
    """What a compiled program does to buffers of 37 rows, outside of fusions."""
    bodies = dict(
        re.findall(r"^%(fused_computation[\w.]*|wrapped[\w.]*) (.*?^})", text, re.M | re.S)
    )
    ops = set()
    for op, rest in re.findall(r"= \w+\[37,[^ ]* ([\w-]+)\((.*)", _without(text, bodies)):
        called = re.search(r"calls=%([\w.]+)", rest)
        root = re.search(r"ROOT .*? ([\w-]+)\(", bodies[called.group(1)]) if called else None
        in_place = "dynamic-update-slice" in (op, root and root.group(1))
        ops.add("in-place update" if in_place else op)
    return ops


def _without(text: str, bodies: dict[str, str]) -> str:
    for body in bodies.values():
        text = text.replace(body, "")
    return text


@pytest.mark.parametrize("tokens", [4, 12])
@pytest.mark.parametrize("grad", [False, True])
def test_bfloat16_is_widened_row_by_row(tokens, grad):
    """No float32 buffer of the size of the stack appears, nor any pass over all of y per chunk."""
    d, f = 24, 40
    gate = jax.ShapeDtypeStruct((37, d, f), jnp.bfloat16)
    weights = GatedWeights(
        w_gate=gate, w_up=gate, w_down=jax.ShapeDtypeStruct((37, f, d), jnp.bfloat16)
    )
    xs = jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16)
    group_sizes = jax.ShapeDtypeStruct((37,), jnp.int32)

    def loss(xs, weights, group_sizes):
        return jnp.sum(blocked_ffn(xs, weights, group_sizes).astype(jnp.float32))

    fn = jax.grad(loss, argnums=(0, 1)) if grad else loss
    text = jax.jit(fn).lower(xs, weights, group_sizes).compile().as_text()
    assert "bf16[37," in text and "f32[37," not in text
