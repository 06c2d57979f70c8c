"""Training with copies of experts, swapped and relocated on the way, against training without."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.dispatch.gather import gather
from moejax.dispatch.placed import placed
from moejax.dispatch.relocate import relocate, swap_experts, to_logical, to_physical
from moejax.experts.combine import combine
from moejax.experts.stage import reference
from moejax.layers.moe import MoEConfig, init_moe
from moejax.placement.build import from_phys_to_log
from moejax.routing.config import RouterConfig
from moejax.routing.gates import route
from moejax.training.replicas import clip_by_logical_norm, logical_norm

E, SLOTS, RANKS, D, T, LAYERS = 6, 8, 4, 8, 32, 2
AXES = ("data", "expert")
MESH = make_mesh(data=2, expert=RANKS)
CFG = MoEConfig(d_ff=4, router=RouterConfig(num_experts=E, top_k=2))
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
ROWS = [
    [[0, 1, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 3]],
    [[2, 0, 1, 2, 3, 2, 4, 5], [0, 1, 2, 3, 4, 5, 2, 3]],
]


def first_placement():
    return from_phys_to_log(ROWS[0], num_experts=E, ranks=RANKS)


def init():
    """Weights [L, ...] in numpy, which compiles nothing; small, so that rounding stays rounding."""
    rng = np.random.default_rng(1)
    make = partial(init_moe, d_model=D, cfg=CFG, out_scale=1.0, dtype=jnp.float32)
    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.tree.map(
        lambda one: rng.normal(size=(LAYERS, *one.shape), scale=0.2).astype(np.float32), shapes
    )


def loss(params, x, stage, axes=()):
    """Two MoE layers on x [T, D], with weights stacked [L, ...]."""
    for index in range(LAYERS):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i], params)
        routing = route(layer.router, x, CFG.router)
        y, _, _ = stage(x, routing, layer.experts, jnp.int32(index), None)
        x = x + (y if y.ndim == 2 else combine(y, routing.topk_weights))
    total = jnp.sum(jnp.square(jnp.sin(x)) * jnp.arange(1.0, D + 1)[None]) / T
    return jax.lax.psum(total, axes) if axes else total


def specs(tree):
    """Everything under `experts` over the mesh, the rest everywhere."""

    def spec(path, leaf):
        del leaf
        names = [getattr(key, "name", None) for key in path]
        return P(None, "expert") if "experts" in names else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def sharded(params, x, placement):
    def body(params, x, placement):
        stage = gather(reference, num_experts=SLOTS, token_axes=AXES)
        return loss(params, x, placed(stage, placement), AXES)

    in_specs = (specs(params), P(AXES), P())
    run = jax.shard_map(body, mesh=MESH, in_specs=in_specs, out_specs=P())
    return run(params, x, placement)


def optimizer(clip):
    """Adam with an epsilon that does not blow up the rounding of vanishing gradients."""
    return optax.chain(
        clip, optax.scale_by_adam(eps=1e-3), optax.add_decayed_weights(0.1), optax.scale(-0.05)
    )


CLIP = 0.5
PLAIN = optimizer(optax.clip_by_global_norm(CLIP))
COPIES = optimizer(clip_by_logical_norm(CLIP))


@partial(jax.jit, compiler_options=FAST)
def plain_step(params, opt_state, x):
    value, grads = jax.value_and_grad(loss)(params, x, reference)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
        updates, opt_state = PLAIN.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, optax.tree.norm(grads)


@partial(jax.jit, compiler_options=FAST)
def step(params, opt_state, x, placement):
    value, grads = jax.value_and_grad(sharded)(params, x, placement)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = COPIES.update(grads, opt_state, params, placement=placement)
    return optax.apply_updates(params, updates), opt_state, value, logical_norm(grads, placement)


def start(params, placement):
    """The state in the slots of a placement, on the mesh."""
    state = to_physical((params, COPIES.init(params)), placement)
    place = partial(NamedSharding, MESH)
    shardings = jax.tree.map(place, specs(state), is_leaf=lambda leaf: isinstance(leaf, P))
    return jax.device_put(state, shardings)


def check_copies_are_equal(params, placement):
    """To the bit."""
    for leaf in jax.tree.leaves(jax.device_get(params.experts)):
        for layer, rows in enumerate(leaf):
            slots = placement.phys_to_log[layer]
            np.testing.assert_array_equal(rows, rows[placement.log_to_phys[layer, slots, 0]])


@pytest.fixture(scope="module")
def batches():
    return np.random.default_rng(0).normal(size=(6, T, D)).astype(np.float32)


def test_training_does_not_know_of_copies_swaps_and_moves(batches):
    params, placement = init(), first_placement()
    want, want_opt = params, PLAIN.init(params)
    got, got_opt = start(params, placement)
    programs, norms = [], []
    for i, x in enumerate(batches):
        if i == 2:
            swaps = {"layers": [0, 1], "a": [0, 2], "b": [5, 7]}
            (got, got_opt), placement = swap_experts((got, got_opt), placement, MESH, **swaps)
        if i == 4:
            new = from_phys_to_log(ROWS[1], num_experts=E, ranks=RANKS)
            got, got_opt = relocate((got, got_opt), placement, new, MESH)
            placement = new
        want, want_opt, want_loss, want_norm = plain_step(want, want_opt, x)
        got, got_opt, value, norm = step(got, got_opt, x, placement)
        np.testing.assert_allclose(value, want_loss, rtol=1e-6)
        np.testing.assert_allclose(norm, want_norm, rtol=1e-6)
        check_copies_are_equal(got, placement)
        logical = to_logical(jax.device_get((got, got_opt)), placement)
        for one, other in zip(*map(jax.tree.leaves, (logical, (want, want_opt))), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6, rtol=0)
        programs.append(step._cache_size())
        norms.append(float(want_norm))
    assert set(programs[1:]) == {programs[1]} and programs[1] <= 2, programs
    assert min(norms) > CLIP  # every step was clipped


def test_the_norm_counts_every_expert_once():
    params, placement = init(), first_placement()
    want = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(params)))
    norms = jax.jit(lambda grads, one: (logical_norm(grads, one), optax.tree.norm(grads)))
    shared = from_phys_to_log(ROWS[0][0], num_experts=E, ranks=RANKS)
    for one in (placement, shared):
        norm, with_copies = norms(to_physical(params, one), one)
        np.testing.assert_allclose(norm, want, rtol=1e-6)
        assert with_copies > 1.05 * want


def test_without_a_placement_it_is_the_clip_of_optax():
    grads = {"w": np.arange(4, dtype=np.float32)}
    got, _ = clip_by_logical_norm(0.5).update(grads, optax.EmptyState())
    want, _ = optax.clip_by_global_norm(0.5).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(got["w"], want["w"])
