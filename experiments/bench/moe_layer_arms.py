"""The arms of the expert-layer benchmark: one layer, several ways to compute it.

A layer is: given routing -> sort, permute, gated MLPs, unpermute. The router is not part of it.

Axis letters:
    T  tokens      K  experts per token      E  experts      D  model dim      F  hidden dim
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels.grouped_ffn import GatedWeights, grouped_ffn
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.grouped_matmul.shapes import SHAPES, ExpertShape, draw_routing
from moejax.kernels.permute import permute, sort_by_group, unpermute

SHAPE = SHAPES["bench"]
Inputs = tuple[jax.Array, jax.Array, jax.Array]  # x [T, D], topk_idx [T, K], topk_weights [T, K]
Layer = Callable[..., jax.Array]
Ffn = Callable[[jax.Array, GatedWeights, jax.Array], jax.Array]


def make_weights(shape: ExpertShape, *, seed: int = 0) -> GatedWeights:
    """Random float32 weights, scaled so that activations keep their size."""
    e, d, f = shape.num_experts, shape.d_model, shape.d_ff
    draw = np.random.default_rng(seed)

    def normal(*dims: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(dims, np.float32) * dims[1] ** -0.5)

    return GatedWeights(w_gate=normal(e, d, f), w_up=normal(e, d, f), w_down=normal(e, f, d))


def make_inputs(shape: ExpertShape, *, zipf: float, routings: int) -> list[Inputs]:
    """One input per routing. For a single token the routings take turns through all experts."""
    inputs = []
    for seed in range(routings):
        draw = np.random.default_rng(1000 + seed)
        x = draw.standard_normal((shape.num_tokens, shape.d_model), np.float32)
        topk_idx, topk_weights = draw_routing(shape, zipf=zipf, seed=seed)
        if shape.num_tokens == 1:
            first = seed * shape.top_k
            topk_idx = (first + np.arange(shape.top_k, dtype=np.int32))[None] % shape.num_experts
        inputs.append((jnp.asarray(x), jnp.asarray(topk_idx), jnp.asarray(topk_weights)))
    return inputs


def expert_bytes_read(inputs: list[Inputs], weights: GatedWeights) -> float:
    """Bytes of the distinct experts that a call must read, averaged over `inputs`."""
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / weights.w_gate.shape[0]
    return one * float(np.mean([len(np.unique(np.asarray(idx))) for _, idx, _ in inputs]))


def layer(
    ffn: Ffn, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, weights: GatedWeights
) -> jax.Array:
    """The expert layer on `ffn`: [T, D] -> [T, D]."""
    perm = sort_by_group(topk_idx, weights.w_gate.shape[0])
    y = ffn(permute(x, perm, topk_idx.shape[1]), weights, perm.group_sizes)
    return unpermute(y, perm, topk_weights)


def over_devices(layer_fn: Layer, mesh: Mesh) -> Layer:
    """The layer with the hidden dim split over all devices of `mesh`: equal work on each."""

    def run(x, topk_idx, topk_weights, weights):
        def part(*args):
            return jax.lax.psum(layer_fn(*args), mesh.axis_names)

        specs = (P(), P(), P(), _weight_specs(mesh))
        run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P())
        return run(x, topk_idx, topk_weights, weights)

    return run


def place(
    inputs: list[Inputs], weights: GatedWeights, mesh: Mesh
) -> tuple[list[Inputs], GatedWeights]:
    """Inputs on all devices, hidden dims split over them."""
    inputs = jax.device_put(inputs, NamedSharding(mesh, P()))
    return inputs, jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        weights,
        _weight_specs(mesh),
    )


def _weight_specs(mesh: Mesh) -> GatedWeights:
    column = P(None, None, mesh.axis_names)
    row = P(None, mesh.axis_names)
    return GatedWeights(**dict[str, Any](w_gate=column, w_up=column, w_down=row))


def ragged_ffn(xs: jax.Array, weights: GatedWeights, group_sizes: jax.Array) -> jax.Array:
    """The gated MLP as three calls of `jax.lax.ragged_dot`."""
    dot = partial(grouped_matmul, group_sizes=group_sizes, implementation="ragged_dot")
    return dot(jax.nn.silu(dot(xs, weights.w_gate)) * dot(xs, weights.w_up), weights.w_down)


moejax_layer = partial(layer, grouped_ffn)
ragged_layer = partial(layer, ragged_ffn)
reference_layer = partial(layer, partial(grouped_ffn, implementation="reference"))


def dense_ffn(
    x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, weights: GatedWeights
) -> jax.Array:
    """One expert's MLP on T * K rows: the same useful operations with one set of weights."""
    rows = jnp.tile(x, (topk_idx.shape[1], 1))
    hidden = jax.nn.silu(rows @ weights.w_gate[0]) * (rows @ weights.w_up[0])
    return hidden @ weights.w_down[0]


def balanced_ffn(
    x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, weights: GatedWeights
) -> jax.Array:
    """All experts with T * K / E rows each, as batched dot_generals: no routing at all."""
    experts, d_model, _ = weights.w_gate.shape
    rows = jnp.tile(x, (topk_idx.shape[1], 1)).reshape(experts, -1, d_model)
    dot = partial(jnp.einsum, "erd,edf->erf")
    return dot(jax.nn.silu(dot(rows, weights.w_gate)) * dot(rows, weights.w_up), weights.w_down)


def with_gradients(layer_fn: Layer) -> Callable[..., object]:
    """Value and gradients of `sum(y ** 2)` for x, topk_weights and the weights."""

    def loss(x, topk_weights, weights, topk_idx):
        return jnp.sum(layer_fn(x, topk_idx, topk_weights, weights) ** 2)

    def run(x, topk_idx, topk_weights, weights):
        grads = jax.value_and_grad(loss, argnums=(0, 1, 2))
        return grads(x, topk_weights, weights, topk_idx)

    return run


@dataclasses.dataclass
class Arm:
    """A compiled layer that walks through its inputs, one per call."""

    compiled: jax.stages.Compiled
    inputs: list[Inputs]
    weights: GatedWeights
    calls: int = 0

    @classmethod
    def compile(
        cls, fn: Callable[..., object], inputs: list[Inputs], weights: GatedWeights
    ) -> "Arm":
        return cls(jax.jit(fn).lower(*inputs[0], weights).compile(), inputs, weights)

    def __call__(self) -> object:
        self.calls += 1
        return self.compiled(*self.inputs[self.calls % len(self.inputs)], self.weights)

    @property
    def temp_mib(self) -> float:
        """Memory beyond arguments and outputs, as the compiler reports it."""
        analysis = self.compiled.memory_analysis()
        if analysis is None:
            raise RuntimeError(f"{jax.default_backend()} reports no memory analysis")
        return analysis.temp_size_in_bytes / 2**20
