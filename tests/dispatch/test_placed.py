"""Placements and policies change no output: every strategy, one program for all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.dispatch.all_to_all import all_to_all
from moejax.dispatch.gather import gather
from moejax.dispatch.hierarchical import hierarchical
from moejax.dispatch.pipelined import pipelined
from moejax.dispatch.placed import placed
from moejax.dispatch.ragged import ragged
from moejax.dispatch.replicas import aebs, least_tokens, local_first, round_robin
from moejax.dispatch.slots import FITS_ALL
from moejax.experts.stage import reference
from moejax.placement.build import from_phys_to_log
from tests.dispatch.cases import E, inputs, layout, loss, routings, specs
from tests.kernels.cases import assert_close

SLOTS = 24
# Outputs of these come back apart and are combined in k order, whoever computed them.
KEEP_ORDER = ("all_to_all", "ragged")
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time


def placements():
    """Three placements of 16 experts on 24 slots: in order, shuffled, eight copies of one."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.permutation(np.concatenate([np.arange(E), np.arange(8)]))
        if all(len(set(held)) == 3 for held in rows.reshape(8, 3)):
            break
    hot = np.array([[5, 2 * r + (r >= 3), 2 * r + 1 + (r >= 2)] for r in range(8)])
    hot = np.where(hot == E, 0, hot)
    in_order = np.concatenate([np.arange(E), np.arange(8)])
    return [
        from_phys_to_log(row, num_experts=E, ranks=8) for row in (in_order, rows, hot.reshape(-1))
    ]


def strategies():
    """name -> (layout, stage over the slots, axis, policy)."""
    flat, nested = layout(1, 8), layout(2, 4, both=True)
    options: dict[str, Any] = {"num_experts": SLOTS, "token_axes": flat.token_axes}
    options["inner"] = reference
    gathered = gather(**options)
    exchange = all_to_all(**options, capacity=FITS_ALL)
    levels = hierarchical(**options, levels=("data", "expert"))
    return {
        "gather": (layout(2, 4, axis_type="explicit"), gathered, "expert", round_robin),
        "all_to_all": (flat, exchange, "expert", local_first),
        "ragged": (flat, ragged(**options), "expert", least_tokens),
        "hierarchical": (nested, levels, ("data", "expert"), aebs),
        "pipelined": (flat, pipelined(gathered, num_chunks=2), "expert", round_robin),
    }


@pytest.fixture(scope="module")
def arguments():
    """Parameters and tokens as numpy arrays: indexing them compiles nothing."""
    return jax.device_get(inputs())


@partial(jax.jit, compiler_options=FAST)
def dense(params, x, idx):
    fn = jax.value_and_grad(partial(loss, stage=reference), argnums=(0, 1), has_aux=True)
    (_, (y, _)), grads = fn(params, x, idx)
    return y, grads


def compiled(name, *, gradients):
    """jit of `(params, x, idx, placement) -> (y, metrics)`, or with the gradients behind."""
    where, stage, axis, policy = strategies()[name]
    params, _ = inputs()
    tokens = P(where.token_axes)
    in_specs = (specs(params, where), tokens, tokens, P())

    def body(params, x, idx, placement):
        here = placed(stage, placement, axis=axis, policy=policy)
        return loss(params, x, idx, stage=here, token_axes=where.token_axes)

    run = jax.shard_map(body, mesh=where.mesh, in_specs=in_specs, out_specs=(P(), (tokens, P())))

    @partial(jax.jit, compiler_options=FAST)
    def fn(params, x, idx, placement):
        if not gradients:
            return run(params, x, idx, placement)[1], None
        (_, output), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
            params, x, idx, placement
        )
        return output, grads

    def put(args):
        shardings = jax.tree.map(
            partial(NamedSharding, where.mesh),
            in_specs[:3],
            is_leaf=lambda leaf: isinstance(leaf, P),
        )
        return jax.device_put(args, shardings)

    return fn, put


def physical(experts, placement):
    return jax.tree.map(lambda leaf: leaf[placement.phys_to_log], experts)


@pytest.mark.parametrize(
    "name, gradients",
    [
        ("gather", True),
        ("all_to_all", True),
        ("ragged", False),
        ("hierarchical", False),
        ("pipelined", False),
    ],
)
def test_no_output_depends_on_the_placement(name, gradients, arguments):
    params, x = arguments
    fn, put = compiled(name, gradients=gradients)
    for routing in ("one_hot_expert", "padding"):
        idx = routings()[routing]
        want_y, want = jax.device_get(dense(params, x, idx))
        outputs = []
        for placement in placements():
            held = params.replace(experts=physical(params.experts, placement))
            (y, metrics), grads = fn(*put((held, x, idx)), placement)
            assert metrics.assignments_dropped == 0
            assert_close(y, want_y)
            outputs.append(np.asarray(y))
            if gradients:
                check_gradients(grads, want, placement)
        for y in outputs[1:]:
            if name in KEEP_ORDER:
                np.testing.assert_array_equal(y, outputs[0])
            else:
                assert_close(y, outputs[0], tolerance=1e-6)
    assert fn._cache_size() == 1


def check_gradients(got, want, placement):
    """Every copy has the gradient of its expert, the same bits as the others."""
    (params, dx), (want_params, want_dx) = jax.device_get(got), want
    tied = want_params.replace(experts=physical(want_params.experts, placement))
    assert_close((params, dx), (tied, want_dx))
    first = placement.log_to_phys[placement.phys_to_log, 0]
    for leaf in jax.tree.leaves(params.experts):
        np.testing.assert_array_equal(leaf, leaf[first])


def test_without_a_mesh_axis(arguments):
    params, x = arguments
    idx = routings()["uniform"]
    placement = placements()[1]

    @partial(jax.jit, compiler_options=FAST)
    def run(params, x, idx, placement):
        return loss(params, x, idx, stage=placed(reference, placement, axis=None))[1][0]

    held = params.replace(experts=physical(params.experts, placement))
    assert_close(run(held, x, idx, placement), dense(params, x, idx)[0])


def test_wrong_input(arguments):
    params, x = arguments
    placement = placements()[0]
    stage = placed(reference, placement, axis=None)
    with pytest.raises(InputError, match="has 24 slots, the weights 16 on each of 1 ranks"):
        loss(params, x, jnp.asarray(routings()["uniform"]), stage=stage)
    where = layout(1, 5)
    stage = placed(gather(num_experts=SLOTS), placement)
    run = jax.shard_map(
        lambda x: stage(x, None, None, jnp.int32(0), None),  # pyrefly: ignore[bad-argument-type]
        mesh=where.mesh,
        in_specs=P(),
        out_specs=P(),
    )
    with pytest.raises(InputError, match="24 slots are not divisible by 5 ranks"):
        run(x)
