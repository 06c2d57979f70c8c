"""Facts of small programs that libtpu really compiles; each bad program must be caught."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.compile import abstract, compile_for
from moejax.aot.targets import target_mesh
from moejax.core.compat import DEVICE, HOST, compute_on
from moejax.core.errors import InputError
from moejax.core.memory import device_sharding, fetch_rows, host_sharding

L, D, F, B, S = 6, 256, 512, 8, 3
ROW = D * F * 2  # bytes of one weight matrix in bfloat16


def _array(shape, sharding, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.fixture(params=["v5e:2x2", "v6e:2x2"])
def one_chip(request):
    return target_mesh(request.param)


@pytest.fixture(scope="module")
def chip():
    return target_mesh("v5e:2x2")


@pytest.fixture(scope="module")
def four_chips():
    return target_mesh("v5e:2x2", expert=4)


def _store(mesh):
    host = host_sharding(mesh)
    return {"w_in": _array((L, D, F), host), "w_out": _array((L, F, D), host)}


def _mlp(weights, x):
    with jax.named_scope("compute"):
        return x + jnp.tanh(x @ weights["w_in"]) @ weights["w_out"]


def _fetch(store, index):
    with jax.named_scope("fetch"):
        return fetch_rows(store, index)


def test_streaming_scan_fetches_in_the_loop(one_chip):
    def stream(store, x):
        def layer(x, weights):
            return _mlp(jax.device_put(weights, DEVICE), x), None

        return jax.lax.scan(layer, x, store)[0]

    facts = compile_for(stream, (_store(one_chip), _array((B, D), device_sharding(one_chip))))
    assert sorted(one.nbytes for one in facts.fetches()) == [ROW, ROW]
    assert all(one.start < one.done for one in facts.transfers)
    assert facts.memory.host_temporaries == 0
    assert facts.memory.host_arguments == facts.memory.host_bytes == 2 * L * ROW
    assert facts.memory.device_arguments == B * D * 2
    assert facts.whole_copies((L, D, F)) == ()
    assert (facts.host_callbacks, facts.host_computes) == (0, ())


def _prefetching(store, x, slots, order, unroll=False):
    """Layers of a data-dependent order: landing buffers, written into a slot cache, then read."""

    def layer(carry, index):
        x, slots, landed = carry
        here = index % S
        slots = jax.tree.map(
            lambda a, row: jax.lax.dynamic_update_index_in_dim(a, row, here, 0), slots, landed
        )
        landed = _fetch(store, order[(index + 1) % L])
        weights = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, here, keepdims=False), slots
        )
        if not unroll:  # the kernel's form: a loop of unknown length
            x = jax.lax.fori_loop(0, order[0] + 1, lambda _, x: _mlp(weights, x), x)
        else:
            x = _mlp(weights, x)
        return (x, slots, landed), None

    first = fetch_rows(store, order[0])
    carry, _ = jax.lax.scan(layer, (x, slots, first), jnp.arange(L))
    return carry[0], carry[1]


def _prefetch_args(mesh):
    device = device_sharding(mesh)
    slots = {"w_in": _array((S, D, F), device), "w_out": _array((S, F, D), device)}
    return _store(mesh), _array((B, D), device), slots, _array((L,), device, jnp.int32)


@pytest.mark.parametrize("unroll", [False, True])
def test_prefetch_into_landing_buffers_overlaps(one_chip, unroll):
    def step(*args):
        return _prefetching(*args, unroll=unroll)

    facts = compile_for(step, _prefetch_args(one_chip), donate_argnums=2)
    fetches = facts.fetches("fetch")
    assert [one.nbytes for one in fetches] == [ROW, ROW]
    assert facts.overlapped("fetch", "compute") == fetches
    assert len(facts.fetches()) == 4  # and the first layer's two, which hide behind nothing
    assert facts.memory.host_temporaries == 0
    assert facts.memory.device_aliased == 2 * S * ROW
    assert facts.whole_copies((S, D, F)) == ()
    assert facts.whole_copies((L, D, F)) == ()


def test_a_single_carried_buffer_is_seen_to_serialise(chip):
    def step(store, x, slots, order):
        def layer(carry, index):
            x, weights = carry
            following = _fetch(store, order[(index + 1) % L])
            return (_mlp(weights, x), following), None

        first = fetch_rows(store, order[0])
        return jax.lax.scan(layer, (x, first), jnp.arange(L))[0][0]

    facts = compile_for(step, _prefetch_args(chip))
    assert len(facts.fetches("fetch")) == 2
    assert facts.overlapped("fetch", "compute") == ()


def test_a_fetch_under_a_condition_is_seen_to_serialise(chip):
    def step(store, x, hit, index):
        resident = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), store)
        weights = jax.lax.cond(hit, lambda: resident, lambda: _fetch(store, index))
        return _mlp(resident, x) + _mlp(weights, x)

    device = device_sharding(chip)
    scalars = _array((), device, jnp.bool_), _array((), device, jnp.int32)
    facts = compile_for(step, (_store(chip), _array((B, D), device), *scalars))
    assert len(facts.fetches("fetch")) == 2
    assert facts.overlapped("fetch", "compute") == ()


def test_a_cache_that_is_not_donated_is_copied_whole(chip):
    def write(cache, row, slot):
        return jax.lax.dynamic_update_index_in_dim(cache, row, slot, 0)

    device = device_sharding(chip)
    args = (_array((64, D, F), device), _array((D, F), device), _array((), device, jnp.int32))
    assert len(compile_for(write, args).whole_copies((64, D, F))) == 1
    donated = compile_for(write, args, donate_argnums=0)
    assert donated.whole_copies((64, D, F)) == ()
    assert donated.memory.device_aliased == 64 * ROW
    assert donated.memory.device_bytes < 66 * ROW


def test_slicing_an_automatically_sharded_stack_gathers_it_on_the_host(four_chips):
    def step(store, index, x):
        return x @ fetch_rows(store, index)

    device = device_sharding(four_chips)
    store = _array((32, D, F), host_sharding(four_chips, P("expert")))
    args = (store, _array((), device, jnp.int32), _array((B, D), device))
    facts = compile_for(step, args)
    assert facts.memory.host_temporaries >= 32 * ROW
    assert facts.host_computes


def test_slicing_inside_shard_map_moves_only_rows(four_chips):
    @jax.shard_map(mesh=four_chips, in_specs=(P("expert"), P("expert"), P()), out_specs=P())
    def step(store, index, x):
        with jax.named_scope("combine"):
            return jax.lax.psum(x @ fetch_rows(store, index[0]), "expert")

    args = (
        _array((32, D, F), host_sharding(four_chips, P("expert"))),
        _array((4,), device_sharding(four_chips, P("expert")), jnp.int32),
        _array((B, D), device_sharding(four_chips)),
    )
    facts = compile_for(step, args)
    assert facts.memory.host_temporaries == 0
    assert facts.memory.host_arguments == 8 * ROW  # of one device
    assert [one.nbytes for one in facts.fetches()] == [ROW]
    (summed,) = facts.collectives
    assert (summed.kind, summed.axes) == ("all-reduce", ("expert",))
    assert summed.nbytes == B * F * 2
    assert "combine" in summed.scope


def test_int8_rows_in_the_default_layout_copy_the_stack(chip):
    store = _array((16, D, F), host_sharding(chip), jnp.int8)
    index = _array((), device_sharding(chip), jnp.int32)
    facts = compile_for(fetch_rows, (store, index))
    assert facts.memory.host_temporaries >= 16 * D * F


def test_host_compute_and_callbacks_are_counted(chip):
    def on_host(weights, x):
        product = compute_on(
            lambda w, x: x @ w, compute_type="device_host", out_memory_spaces=HOST
        )(weights, jax.device_put(x, HOST))
        return jax.device_put(product, DEVICE)

    device = device_sharding(chip)
    weights, x = _array((D, F), host_sharding(chip)), _array((B, D), device)
    facts = compile_for(on_host, (weights, x))
    assert (len(facts.host_computes), facts.host_callbacks) == (1, 0)
    called = compile_for(lambda x: jax.pure_callback(lambda a: a, x, x), (x,))
    assert (called.host_computes, called.host_callbacks) == ((), 1)


def test_a_jitted_function_keeps_its_own_options(chip):
    device = device_sharding(chip)
    cache = _array((64, D, F), device)
    step = jax.jit(lambda cache: cache.at[0].set(0), donate_argnums=0)
    assert compile_for(step, (cache,)).memory.device_aliased == 64 * ROW
    with pytest.raises(
        InputError, match="donate_argnums belong to jax.jit, and fn is jitted already"
    ):
        compile_for(step, (cache,), donate_argnums=0)


def test_host_outputs_want_out_shardings(chip):
    host = host_sharding(chip)

    def write(store, row):
        return jax.lax.dynamic_update_index_in_dim(store, jax.device_put(row, HOST), 1, 0)

    args = (_array((L, D, F), host), _array((D, F), device_sharding(chip)))
    facts = compile_for(write, args, donate_argnums=0, out_shardings=host)
    assert facts.memory.host_aliased == facts.memory.host_outputs == L * ROW
    assert facts.memory.host_bytes == L * ROW
    assert [one.direction for one in facts.transfers] == ["device_to_host"]
    assert facts.transfers[0].nbytes == ROW


def test_compiler_options_reach_the_compiler(chip):
    x = _array((B, D), device_sharding(chip))
    with pytest.raises(Exception, match="no_such_option"):
        compile_for(lambda x: x + 1, (x,), compiler_options={"no_such_option": True})


def test_arguments_must_name_one_mesh(chip, four_chips):
    placed = _array((B, D), device_sharding(chip))
    with pytest.raises(InputError, match="found 0 meshes and 1 other placements"):
        compile_for(jnp.sum, (jax.ShapeDtypeStruct((B, D), jnp.float32),))
    with pytest.raises(InputError, match="found 2 meshes and 0 other placements"):
        compile_for(jnp.add, (placed, _array((B, D), device_sharding(four_chips))))


def test_abstract_keeps_shapes_and_sets_the_memory(chip):
    tree = {"a": jnp.zeros((2, 3)), "b": jax.random.key(0)}
    host = host_sharding(chip)
    result = abstract(tree, host)
    assert result["a"].shape == (2, 3) and result["b"].dtype == tree["b"].dtype
    assert {leaf.sharding for leaf in jax.tree.leaves(result)} == {host}
