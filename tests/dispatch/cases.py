"""One battery for all strategies: routings, the dense reference, one compilation per strategy.

Every strategy meets the kernel (`resident`) in one test; elsewhere `inner=reference` compiles in
half the time.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core.mesh import make_mesh
from moejax.experts.stage import reference
from moejax.layers.moe import MoEConfig, init_moe, moe
from moejax.layers.parallel import Parallel
from moejax.routing.config import RouterConfig
from tests.kernels.cases import assert_close

E, D, T, K = 16, 8, 64, 4
AxisKind = Literal["auto", "explicit"]
# Weights that are not renormalised: dropping a choice leaves those of the others as they are.
CFG = MoEConfig(d_ff=4, router=RouterConfig(num_experts=E, top_k=K, renormalize=False))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and what lies over its axes."""

    mesh: Mesh
    token_axes: tuple[str, ...]
    expert_axes: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Ranks that experts are sharded over."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.expert_axes]))


def layout(data: int, expert: int, *, axis_type: AxisKind = "auto", both: bool = False) -> Layout:
    """Tokens over (data, expert); experts over `expert`, or over both axes."""
    axes = ("data", "expert")
    mesh = make_mesh(data=data, expert=expert, axis_type=axis_type)
    return Layout(mesh, axes, axes if both else ("expert",))


def cube() -> Layout:
    """Three levels of links."""
    axes = ("node", "board", "chip")
    grid = np.array(jax.devices()).reshape(2, 2, 2)
    return Layout(Mesh(grid, axes, axis_types=(AxisType.Auto,) * 3), axes, axes)


def routings() -> dict[str, np.ndarray]:
    """int32 [T, K] choices from balanced to one hot expert, with padding (id E)."""
    rng = np.random.default_rng(0)
    uniform = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    hot = uniform.copy()
    hot[:, 0] = 5
    for row in hot:  # distinct again
        row[1:] = rng.permutation([e for e in range(E) if e != 5])[: K - 1]
    few = np.stack([rng.permutation([0, 1, 2, 3, 9])[:K] for _ in range(T)])
    padded = uniform.copy()
    padded[np.arange(T) % 5 == 0] = E
    return {
        "uniform": uniform.astype(np.int32),
        "one_hot_expert": hot.astype(np.int32),
        "empty_experts": few.astype(np.int32),
        "padding": padded.astype(np.int32),
    }


def balanced_routing(groups: int) -> np.ndarray:
    """int32 [T, K]: K / groups choices in each of `groups` groups of experts."""
    rng, size = np.random.default_rng(1), E // groups
    rows = [
        np.concatenate([g * size + rng.permutation(size)[: K // groups] for g in range(groups)])
        for _ in range(T)
    ]
    return np.stack(rows).astype(np.int32)


def loss(params, x, forced_idx, *, stage, token_axes=()):
    y, _, _, metrics = moe(
        params,
        x,
        CFG,
        forced_idx=forced_idx,
        stage=stage,
        parallel=Parallel(token_axes=token_axes),
    )
    total = jnp.sum(jnp.sin(y) * jnp.arange(1.0, D + 1)[None])
    if token_axes:
        total = jax.lax.psum(total, token_axes)
    return total, (y, metrics)


def inputs():
    params = init_moe(jax.random.key(0), D, CFG, out_scale=1.0, dtype=jnp.float32)
    return params, jax.random.normal(jax.random.key(1), (T, D))


@jax.jit
def _dense(params, x, forced_idx):
    fn = jax.value_and_grad(partial(loss, stage=reference), argnums=(0, 1), has_aux=True)
    return fn(params, x, forced_idx)


def specs(params, where: Layout):
    everywhere = jax.tree.map(lambda _: P(), params)
    experts = jax.tree.map(lambda _: P(where.expert_axes), params.experts)
    return everywhere.replace(experts=experts)


def compiled(stage, where: Layout):
    """`(params, x, forced_idx) -> ((loss, (y, metrics)), gradients)` over the mesh."""
    params, _ = inputs()
    tokens = P(where.token_axes)
    in_specs = (specs(params, where), tokens, tokens)
    body = jax.shard_map(
        partial(loss, stage=stage, token_axes=where.token_axes),
        mesh=where.mesh,
        in_specs=in_specs,
        out_specs=(P(), (tokens, P())),
    )
    fn = jax.jit(jax.value_and_grad(body, argnums=(0, 1), has_aux=True))

    def run(*args):
        shardings = jax.tree.map(
            partial(NamedSharding, where.mesh), in_specs, is_leaf=lambda leaf: isinstance(leaf, P)
        )
        return fn(*jax.device_put(args, shardings))

    return run


def check_exact(run, idx: np.ndarray, *, dropped: np.ndarray | None = None):
    """Values and gradients equal the reference's; bool [T, K] `dropped` choices are masked there.

    Returns the metrics.
    """
    params, x = inputs()
    (got, (y, metrics)), grads = run(params, x, idx)
    kept = idx if dropped is None else np.where(dropped, E, idx)
    (want, (want_y, _)), want_grads = _dense(params, x, kept)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_close(np.asarray(y), np.asarray(want_y))
    assert_close(jax.device_get(grads), jax.device_get(want_grads))
    assert metrics.assignments_dropped == (0 if dropped is None else dropped.sum())
    return metrics


def first_come(idx: np.ndarray, group: np.ndarray, capacity: int, ranks: int) -> np.ndarray:
    """bool [T, K]: choices dropped when every rank serves `capacity` per group, in token order."""
    dropped = np.zeros(idx.shape, bool)
    for tokens in np.split(np.arange(len(idx)), ranks):
        taken: dict[int, int] = {}
        for t in tokens:
            for k in range(idx.shape[1]):
                if idx[t, k] < E:
                    taken[group[t, k]] = taken.get(group[t, k], 0) + 1
                    dropped[t, k] = taken[group[t, k]] > capacity
    return dropped
