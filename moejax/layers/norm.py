"""Normalisation: root mean square (arXiv 1910.07467), or mean and variance (arXiv 1607.06450)."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass(kw_only=True)
class LayerNormParams:
    """Weights of a layer norm; a root-mean-square norm has one array instead."""

    scale: jax.Array  # [D]
    bias: jax.Array  # [D]


NormParams: TypeAlias = jax.Array | LayerNormParams


def init_norm(kind: str, dim: int, dtype: jnp.dtype) -> NormParams:
    """Weights that leave the normalised vector alone; `kind` is `rms` or `layer`."""
    ones = jnp.ones((dim,), dtype)
    if kind == "rms":
        return ones
    return LayerNormParams(scale=ones, bias=jnp.zeros((dim,), dtype))


def normalize(x: jax.Array, params: NormParams, eps: float) -> jax.Array:
    """x [..., D] normalised by the kind of norm that `params` belong to; x's dtype."""
    if isinstance(params, LayerNormParams):
        return layer_norm(x, params, eps)
    return rms_norm(x, params, eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scales x [..., D] to unit root mean square in float32, then by `weight` [D]; x's dtype."""
    weight32 = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (_unit(x, eps) * weight32).astype(x.dtype)


def unit_norm(x: jax.Array, eps: float) -> jax.Array:
    """x [..., D] scaled to unit root mean square in float32, without a weight; x's dtype."""
    return _unit(x, eps).astype(x.dtype)


def layer_norm(x: jax.Array, params: LayerNormParams, eps: float) -> jax.Array:
    """x [..., D] with mean 0 and variance 1 in float32, then scaled and shifted; x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + params.scale.shape
    weight, bias = (a.astype(jnp.float32).reshape(shape) for a in (params.scale, params.bias))
    return (centred * scale * weight + bias).astype(x.dtype)


def _unit(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
