"""Principal components of recorded gate inputs: fewer numbers for a predictor to read.

Axis letters:
    L  MoE layers    T  tokens    D  model dim    P  components
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moejax.core.errors import check


@struct.dataclass(kw_only=True)
class Compression:
    """Where the data lies and its widest directions, each scaled to unit variance."""

    mean: jax.Array  # [D]
    basis: jax.Array  # [D, P]


def fit_compression(hidden: np.ndarray, components: int) -> tuple[Compression, np.ndarray]:
    """The `components` widest directions of every layer of `hidden` [L, T, D].

    Returns `Compression` with leading [L] and the kept share of the variance, float64 [L]. Raises
    `InputError` where there are fewer than P directions. Cost: L * T * D^2 multiply-adds.
    """
    layers, tokens, d_model = hidden.shape
    check(
        1 <= components <= min(d_model, tokens),
        f"components={components} must be between 1 and the {d_model} dims and {tokens} tokens",
    )
    means, bases, kept = [], [], []
    for one in hidden.astype(np.float32):
        mean = one.mean(0)
        centred = one - mean[None]
        values, vectors = np.linalg.eigh((centred.T @ centred / tokens).astype(np.float64))
        wide = values[::-1][:components]
        # A direction without variance says nothing; its scale must not be infinite.
        scale = 1 / np.sqrt(np.maximum(wide, 1e-6 * max(values[-1], 1e-30)))
        means.append(mean)
        bases.append(vectors[:, ::-1][:, :components] * scale[None])
        kept.append(wide.sum() / values.sum())
    params = Compression(
        mean=jnp.asarray(np.stack(means)), basis=jnp.asarray(np.stack(bases), jnp.float32)
    )
    return params, np.array(kept)


def compress(params: Compression, hidden: jax.Array) -> jax.Array:
    """float32 [T, P] of hidden [T, D]; parameters of one layer."""
    return (hidden.astype(jnp.float32) - params.mean[None]) @ params.basis
