"""History predictor: a small net on the token and on earlier choices, without activations.

Inputs: an embedding of the token id, the choices of the last `NUM_RECENT` layers, and the running
average of the target layer's choices in this sequence. An unfitted predictor is the training
popularity. It can run before the step and on another device than the model. (Routing history as a
signal: expert-id MLPs in MoE-Infinity, arXiv 2401.14361, and s-MoE, arXiv 2503.04398.)

Axis letters:
    L  MoE layers    T  tokens    V  vocabulary    C  embedding width    H  hidden units
    E  experts       R  recent layers
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.predictors.features import NUM_RECENT, HistoryFeatures, multi_hot
from moejax.predictors.mlp import MLPParams, init_mlp, mlp, select


@struct.dataclass(kw_only=True)
class HistoryNet:
    """What is fitted. The embedding is shared by all layers."""

    embedding: jax.Array  # [V, C]
    mlp: MLPParams  # leading [L - 1], inputs C + (R + 1) * E


@struct.dataclass(kw_only=True)
class HistoryParams:
    """A history predictor and the average that its sequences begin with."""

    net: HistoryNet
    popularity: jax.Array  # float32 [L, E], of the training routing


def init_history(
    key: jax.Array, popularity: jax.Array, *, vocab_size: int, embedding: int, hidden: int
) -> HistoryParams:
    """Parameters that predict the log-odds of `popularity` [L, E] for every token."""
    num_layers, num_experts = popularity.shape
    k_embedding, k_mlp = jax.random.split(key)
    inputs = embedding + (NUM_RECENT + 1) * num_experts
    net = init_mlp(k_mlp, num_layers - 1, inputs, hidden, num_experts)
    odds = jnp.clip(popularity[1:], 1e-4, 1 - 1e-4)
    table = jax.random.normal(k_embedding, (vocab_size, embedding))
    net = dataclasses.replace(net, b_out=jnp.log(odds) - jnp.log1p(-odds))
    return HistoryParams(
        net=HistoryNet(embedding=table, mlp=net), popularity=jnp.asarray(popularity)
    )


def scores(params: HistoryParams, layer: jax.Array | int, features: HistoryFeatures) -> jax.Array:
    """float32 [T, E] for target `layer + 1`.

    Cost: T * (C + (R + 1) * E) * (H + E) multiply-adds.
    """
    return one_layer(select(params.net.mlp, layer), params.net.embedding, features)


def one_layer(params: MLPParams, embedding: jax.Array, features: HistoryFeatures) -> jax.Array:
    """Scores from one layer's parameters."""
    tokens, num_experts = features.ema.shape
    recent = multi_hot(features.recent, num_experts).reshape(tokens, NUM_RECENT * num_experts)
    return mlp(params, jnp.concatenate([embedding[features.token], recent, features.ema], -1))
