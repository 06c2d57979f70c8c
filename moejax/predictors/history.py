"""History predictor: the experts of later layers from the choices so far, without activations.

A token's choices are what its hidden state looked like through each layer's router, so they are
added up like the residual stream that they come from: every choice adds a vector to a latent that
starts from the sequence's past and, where ids are known, from the token. One small net, shared by
all layers, reads the latent; each layer has its own output map. The past is the sum that earlier
tokens' choices came to, averaged at the rates `features.DECAYS`: no state but the averages
themselves. Layers share all but their maps, which is what lets a few thousand tokens suffice.

An unfitted predictor is the training popularity. It may run before the step's experts are known
and on another device than the model. (Routing history as a signal: MoE-Infinity, arXiv 2401.14361;
s-MoE, arXiv 2503.04398.)

Axis letters:
    L  MoE layers    T  tokens    V  vocabulary    C  width of the latent    H  hidden units
    E  experts       P  decays    h  horizons 1 .. h
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.predictors.features import (
    DECAYS,
    HistoryFeatures,
    HistoryState,
    initial_ema,
    multi_hot,
    observe,
)
from moejax.predictors.mlp import select


@struct.dataclass(kw_only=True)
class ReaderParams:
    """The shared net, and how each layer modulates it; no leading [L] after `select`."""

    w_in: jax.Array  # [C, H], shared
    w_out: jax.Array  # [H, C], shared
    gain: jax.Array  # [L, H]
    b_in: jax.Array  # [L, H]


@struct.dataclass(kw_only=True)
class TargetParams:
    """Output of one target layer; leading [L] before `select`."""

    w_out: jax.Array  # [L, C, E], shared by the horizons
    b_out: jax.Array  # [L, E]
    scale: jax.Array  # [L, h, C]
    repeat: jax.Array  # [L, h, P], weight of the target layer's own averages


@struct.dataclass(kw_only=True)
class HistoryNet:
    """What is fitted."""

    embedding: jax.Array  # [V, C]; V is 1 where token ids are not known
    choice: jax.Array  # [L, E, C], what a choice adds to the latent
    bias: jax.Array  # [L, C], what the layer itself adds
    past: jax.Array  # [P, C, C]
    reader: ReaderParams
    target: TargetParams


@struct.dataclass(kw_only=True)
class HistoryParams:
    """A history predictor and the average that its sequences begin with."""

    net: HistoryNet
    popularity: jax.Array  # float32 [L, E], of the training routing

    @property
    def horizons(self) -> int:
        """How many layers ahead it predicts, at most."""
        return self.net.target.scale.shape[1]


def init_history(
    key: jax.Array,
    popularity: jax.Array,
    *,
    vocab_size: int,
    embedding: int,
    hidden: int,
    horizons: int = 1,
) -> HistoryParams:
    """Parameters that predict the log-odds of `popularity` [L, E] for every token.

    `embedding` is C, the width of the latent; vocab_size is 1 where token ids are not known.
    """
    num_layers, num_experts = popularity.shape
    check(1 <= horizons < num_layers, f"horizons={horizons} is not in [1, {num_layers}) layers")
    keys = jax.random.split(key, 5)
    c, decays, odds = embedding, len(DECAYS), jnp.clip(popularity, 1e-4, 1 - 1e-4)

    def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
        return jax.random.normal(key, shape) * scale

    reader = ReaderParams(
        w_in=normal(keys[0], (c, hidden), c**-0.5),
        w_out=normal(keys[1], (hidden, c), 0.5 * hidden**-0.5),
        gain=jnp.ones((num_layers, hidden)),
        b_in=jnp.zeros((num_layers, hidden)),
    )
    target = TargetParams(
        w_out=jnp.zeros((num_layers, c, num_experts)),
        b_out=jnp.log(odds) - jnp.log1p(-odds),
        scale=jnp.ones((num_layers, horizons, c)),
        repeat=jnp.zeros((num_layers, horizons, decays)),
    )
    net = HistoryNet(
        embedding=normal(keys[2], (vocab_size, c), 0.3),
        choice=normal(keys[3], (num_layers, num_experts, c), 0.3),
        bias=jnp.zeros((num_layers, c)),
        past=normal(keys[4], (decays, c, c), 0.3 * c**-0.5),
        reader=reader,
        target=target,
    )
    return HistoryParams(net=net, popularity=jnp.asarray(popularity))


def first_latent(net: HistoryNet, token: jax.Array, ema: jax.Array) -> jax.Array:
    """float32 [T, C] before layer 0, from token int32 [T] and averages [L, T, P, E]."""
    layers, tokens, decays, num_experts = ema.shape
    # By hand: XLA:CPU takes 50 times as long over the einsum of one token.
    flat = ema.transpose(2, 1, 0, 3).reshape(decays * tokens, layers * num_experts)
    past = _unit(flat @ net.choice.reshape(layers * num_experts, -1)).reshape(decays, tokens, -1)
    known = jnp.minimum(token, net.embedding.shape[0] - 1)
    return net.embedding[known] + jnp.einsum("ptc,pcd->td", past, net.past)


def read(
    net: HistoryNet, layer: jax.Array | int, latent: jax.Array, keep: jax.Array | None = None
) -> jax.Array:
    """float32 [T, C]: what `layer` makes of its latent; `keep` [T, H] scales hidden units."""
    reader, x = net.reader, _unit(latent)
    gain, b_in = select((reader.gain, reader.b_in), layer)
    hidden = jax.nn.silu((x @ reader.w_in) * gain[None] + b_in[None])
    return x + (hidden if keep is None else hidden * keep) @ reader.w_out


def score(target: TargetParams, x: jax.Array, ema: jax.Array, horizon: int) -> jax.Array:
    """float32 [T, E] of one target layer, from what was read and its averages [T, P, E]."""
    scale, repeat = target.scale[horizon - 1], target.repeat[horizon - 1]
    again = jnp.einsum("tpe,p->te", ema, repeat)
    return (x * scale[None]) @ target.w_out + target.b_out[None] + again


def scores(params: HistoryParams, features: HistoryFeatures, *, horizon: int = 1) -> jax.Array:
    """float32 [L - horizon, T, E] for target layers `horizon` .. L - 1 of recorded tokens."""
    num_experts = features.ema.shape[-1]
    hots = multi_hot(features.chosen, num_experts)
    read_all = latents(params.net, features.token[0], hots, features.ema)
    return targets(params.net, read_all, features.ema, horizon)


def latents(
    net: HistoryNet,
    token: jax.Array,
    hots: jax.Array,
    ema: jax.Array,
    keep: jax.Array | None = None,
) -> jax.Array:
    """What each layer reads, float32 [L, T, C], of choices `hots` [L, T, E]; see `read`."""
    added = jnp.einsum("lte,lec->ltc", hots, net.choice) + net.bias[:, None]
    latent = first_latent(net, token, ema)[None] + jnp.cumsum(added, axis=0)
    axes = (None, 0, 0, None if keep is None else 0)
    return jax.vmap(read, in_axes=axes)(net, jnp.arange(len(hots)), latent, keep)


def targets(net: HistoryNet, read_all: jax.Array, ema: jax.Array, horizon: int) -> jax.Array:
    """Scores [L - horizon, T, E] from what the layers read."""
    later = jax.tree.map(lambda leaf: leaf[horizon:], net.target)
    ask = jax.vmap(score, in_axes=(0, 0, 0, None))
    return ask(later, read_all[:-horizon], ema[horizon:], horizon)


def init_state(params: HistoryParams, batch: int) -> HistoryState:
    """The state before the first token of `batch` sequences."""
    return HistoryState(
        ema=initial_ema(params.popularity, batch),
        latent=jnp.zeros((batch, params.net.embedding.shape[1])),
        token=jnp.zeros((batch,), jnp.int32),
    )


def follow(
    params: HistoryParams, state: HistoryState, layer: jax.Array, topk_idx: jax.Array
) -> HistoryState:
    """Adds the choices int32 [B, K] of `layer` to the latents and to the averages.

    Cost: (K + 1) * B * C additions, and P * L * E * C multiply-adds per sequence in layer 0.
    """
    net = params.net

    # Not a loop of at most one trip, as elsewhere: XLA:CPU copies all vectors into each of them.
    latent = jax.lax.cond(
        layer == 0,
        lambda: first_latent(net, state.token, state.ema),
        lambda: state.latent,
    )
    choice, bias = select((net.choice, net.bias), layer)
    hots = multi_hot(topk_idx, choice.shape[0])
    state = dataclasses.replace(state, latent=latent + hots @ choice + bias[None])
    return observe(state, layer, topk_idx)


def ask(
    params: HistoryParams, state: HistoryState, layer: jax.Array, *, horizon: int = 1
) -> jax.Array:
    """float32 [B, E] for target `layer + horizon`, in `layer` after its `follow`.

    Cost: B * C * (2 * H + E) multiply-adds.
    """
    x = read(params.net, layer, state.latent)
    target, ema = select((params.net.target, state.ema), layer + horizon)
    return score(target, x, ema, horizon)


def _unit(x: jax.Array) -> jax.Array:
    """x at unit root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
