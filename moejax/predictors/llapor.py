"""LLaPor: a small net per layer on the compressed gate input, of a kind that suits the layer.

Layers near the input and the output are easier to predict and noisier: a shallow net on few
components. Those in the middle get a deeper net on more components, with a residual block that a
gate driven by the input modulates (PreScope, arXiv 2509.23638, its predictor). A block is linear,
then gelu. Beside them a linear map of the components, not in the paper, begins as the next layer's
router seen through them, so that fitting starts from next-gate; no router is read afterwards.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    P  components    H  hidden units    E  experts
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.predictors.mlp import select
from moejax.predictors.pca import Compression, compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlaporConfig:
    """Sizes and losses of the two kinds of net.

    The paper compresses 4096 to 256 (edge) and 512 (middle). A model of 128 has no directions to
    spare: docs/second_model.md says what fewer components cost. The paper's losses are `focal=1` or
    more and `balance=1`; recall is best without.

    Attributes:
        edge_components, middle_components: P.
        edge_hidden, middle_hidden: H.
        focal: exponent of the focal loss of edge layers, 0 for cross entropy.
        balance: weight of their load term, see `moejax.predictors.fit_hidden`.
    """

    edge_components: int = 128
    middle_components: int = 128
    edge_hidden: int = 128
    middle_hidden: int = 160
    focal: float = 0.0
    balance: float = 0.0

    def __post_init__(self):
        for name in ("edge_components", "middle_components", "edge_hidden", "middle_hidden"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("focal", "balance"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


@struct.dataclass(kw_only=True)
class ShallowNet:
    """One block, for layers near input and output."""

    w_linear: jax.Array  # [P, E]
    w_in: jax.Array  # [P, H]
    b_in: jax.Array  # [H]
    w_out: jax.Array  # [H, E]
    b_out: jax.Array  # [E]


@struct.dataclass(kw_only=True)
class GatedNet:
    """Two blocks, the second residual and gated, for layers in the middle."""

    w_linear: jax.Array  # [P, E]
    w_in: jax.Array  # [P, H]
    b_in: jax.Array  # [H]
    w_gate: jax.Array  # [P, H]
    b_gate: jax.Array  # [H]
    w_block: jax.Array  # [H, H]
    b_block: jax.Array  # [H]
    w_out: jax.Array  # [H, E]
    b_out: jax.Array  # [E]


@struct.dataclass(kw_only=True)
class LlaporParams:
    """Nets of the L - 1 layers that predict the next; half of `edge` is near the input."""

    edge: ShallowNet  # leading [2 * edge]
    middle: GatedNet  # leading [L - 1 - 2 * edge]
    edge_inputs: Compression  # measured, not learned
    middle_inputs: Compression


def layer_groups(num_layers: int) -> dict[str, range]:
    """The predicting layers 0 ... L - 2 near the input, in the middle, near the output.

    >>> layer_groups(12)
    {'input': range(0, 3), 'middle': range(3, 8), 'output': range(8, 11)}
    """
    check(num_layers >= 4, f"three groups of layers want num_layers >= 4, got {num_layers}")
    last = num_layers - 1
    edge = max(1, round(last / 4))
    return {
        "input": range(edge),
        "middle": range(edge, last - edge),
        "output": range(last - edge, last),
    }


def init_llapor(
    key: jax.Array,
    edge: Compression,
    middle: Compression,
    cfg: LlaporConfig,
    *,
    num_experts: int,
) -> LlaporParams:
    """Nets that score every expert alike, until `start_from_routers`; leading layer axes."""
    k_edge, k_middle, k_gate, k_block = jax.random.split(key, 4)

    def dense(key: jax.Array, layers: int, inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(key, (layers, inputs, outputs)) * inputs**-0.5

    layers, _, components = edge.basis.shape
    hidden = cfg.edge_hidden
    shallow = ShallowNet(
        w_linear=jnp.zeros((layers, components, num_experts)),
        w_in=dense(k_edge, layers, components, hidden),
        b_in=jnp.zeros((layers, hidden)),
        w_out=jnp.zeros((layers, hidden, num_experts)),
        b_out=jnp.zeros((layers, num_experts)),
    )
    layers, _, components = middle.basis.shape
    hidden = cfg.middle_hidden
    deep = GatedNet(
        w_linear=jnp.zeros((layers, components, num_experts)),
        w_in=dense(k_middle, layers, components, hidden),
        b_in=jnp.zeros((layers, hidden)),
        w_gate=dense(k_gate, layers, components, hidden),
        b_gate=jnp.zeros((layers, hidden)),
        w_block=dense(k_block, layers, hidden, hidden),
        b_block=jnp.zeros((layers, hidden)),
        w_out=jnp.zeros((layers, hidden, num_experts)),
        b_out=jnp.zeros((layers, num_experts)),
    )
    return LlaporParams(edge=shallow, middle=deep, edge_inputs=edge, middle_inputs=middle)


def start_from_routers(params: LlaporParams, w_router: jax.Array) -> LlaporParams:
    """The linear maps that give the logits of `w_router` [L, D, E], one layer on, at the start.

    Exact with as many components as dims; with fewer, what the components carry.
    """
    first, count = params.edge.w_in.shape[0] // 2, params.middle.w_in.shape[0]
    later = w_router[1:].astype(jnp.float32)
    ends = jnp.concatenate([later[:first], later[first + count :]])

    def start(net: Any, inputs: Compression, router: jax.Array) -> Any:
        seen = jnp.linalg.pinv(inputs.basis) @ router
        offset = jnp.einsum("ld,lde->le", inputs.mean, router)
        return dataclasses.replace(net, w_linear=seen, b_out=offset)

    return dataclasses.replace(
        params,
        edge=start(params.edge, params.edge_inputs, ends),
        middle=start(params.middle, params.middle_inputs, later[first : first + count]),
    )


def centre(params: LlaporParams, hidden: jax.Array, top_k: int) -> LlaporParams:
    """Scores shifted, layer by layer, so that zero parts the `top_k` best of a typical token.

    A router's logits have any offset; as log-odds they would begin far from right. `hidden` are
    gate inputs [L - 1, T, D].
    """
    first, count = params.edge.w_in.shape[0] // 2, params.middle.w_in.shape[0]
    best, _ = jax.lax.top_k(all_scores(params, hidden), top_k + 1)
    between = jnp.median(best[..., -2:].mean(-1), axis=1)[:, None]
    ends = jnp.concatenate([between[:first], between[first + count :]])

    def shift(net: Any, offset: jax.Array) -> Any:
        return dataclasses.replace(net, b_out=net.b_out - offset)

    return dataclasses.replace(
        params,
        edge=shift(params.edge, ends),
        middle=shift(params.middle, between[first : first + count]),
    )


def scores(params: LlaporParams, layer: jax.Array | int, hidden: jax.Array) -> jax.Array:
    """float32 [T, E] for target `layer + 1` from hidden [T, D], the gate input of `layer`.

    Cost: T * (D * P + P * H + H * E) multiply-adds near the ends, T * (P * H + H * H) more in the
    middle.
    """
    first, count = params.edge.w_in.shape[0] // 2, params.middle.w_in.shape[0]
    layer = jnp.asarray(layer)

    def shallow(hidden: jax.Array) -> jax.Array:
        at = jnp.where(layer < first, layer, layer - count)
        net, inputs = select((params.edge, params.edge_inputs), at)
        return shallow_scores(net, compress(inputs, hidden))

    def deep(hidden: jax.Array) -> jax.Array:
        net, inputs = select((params.middle, params.middle_inputs), layer - first)
        return gated_scores(net, compress(inputs, hidden))

    in_middle = (layer >= first) & (layer < first + count)
    return jax.lax.cond(in_middle, deep, shallow, hidden)


def all_scores(params: LlaporParams, hidden: jax.Array) -> jax.Array:
    """float32 [L - 1, T, E] for all targets from the gate inputs [L - 1, T, D] one layer before."""
    first, count = params.edge.w_in.shape[0] // 2, params.middle.w_in.shape[0]
    ends = jnp.concatenate([hidden[:first], hidden[first + count :]])
    shrink = jax.vmap(compress)
    edge = jax.vmap(shallow_scores)(params.edge, shrink(params.edge_inputs, ends))
    inside = shrink(params.middle_inputs, hidden[first : first + count])
    middle = jax.vmap(gated_scores)(params.middle, inside)
    return jnp.concatenate([edge[:first], middle, edge[first:]])


def shallow_scores(net: ShallowNet, a: jax.Array) -> jax.Array:
    """float32 [T, E] of compressed gate inputs [T, P]."""
    h = jax.nn.gelu(a @ net.w_in + net.b_in[None])
    return a @ net.w_linear + h @ net.w_out + net.b_out[None]


def gated_scores(net: GatedNet, a: jax.Array) -> jax.Array:
    """float32 [T, E] of compressed gate inputs [T, P]."""
    h = jax.nn.gelu(a @ net.w_in + net.b_in[None])
    gate = jax.nn.sigmoid(a @ net.w_gate + net.b_gate[None])
    h = h + gate * jax.nn.gelu(h @ net.w_block + net.b_block[None])
    return a @ net.w_linear + h @ net.w_out + net.b_out[None]
