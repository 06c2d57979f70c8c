"""Rotary position embedding (arXiv 2104.09864), the half-split layout of Llama and its kin.

Every published way to stretch the context (linear, YaRN, Llama 3, LongRoPE) divides the frequency
of each pair by a number of its own and scales the rotated vector. Those numbers are all that a
layer is told of it; `moejax.interop.hf.rope` derives them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.core.errors import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which dims of a head are rotated, and how fast.

    Attributes:
        theta: base of the frequencies.
        dim: leading dims that are rotated, 0 for all of them.
        divisors: one per rotated pair, by which its frequency is divided; empty for ones.
        magnitude: factor of the rotated dims.
    """

    theta: float = 10000.0
    dim: int = 0
    divisors: tuple[float, ...] = ()
    magnitude: float = 1.0

    def __post_init__(self):
        check(self.theta > 0, f"rope theta={self.theta} must be positive")
        check(self.dim >= 0 and self.dim % 2 == 0, f"rope dim={self.dim} must be even")
        wrong = [d for d in self.divisors if d <= 0]
        check(not wrong, f"rope divisors must be positive, got {wrong[:3]}")

    def check_fits(self, head_dim: int) -> None:
        """Raises `InputError` unless heads of `head_dim` can be rotated like this."""
        check(self.dim <= head_dim, f"rope dim={self.dim} exceeds the head's {head_dim} dims")
        pairs = (self.dim or head_dim) // 2
        check(
            len(self.divisors) in (0, pairs),
            f"rope has {len(self.divisors)} divisors for {pairs} pairs of dims",
        )


def rope(
    x: jax.Array,
    positions: jax.Array,
    theta: float,
    *,
    divisors: tuple[float, ...] = (),
    magnitude: float = 1.0,
) -> jax.Array:
    """Rotates x [B, S, H, Dh] by `positions` int32 [B, S]. Angles in float32, x's dtype out."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if divisors:
        frequency = frequency / jnp.asarray(divisors, jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]  # [B, S, Dh/2]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, cfg: RopeConfig | None) -> jax.Array:
    """x [B, S, H, Dh] with its leading `cfg.dim` dims rotated; x itself without a `cfg`."""
    if cfg is None:
        return x
    dim = cfg.dim or x.shape[-1]
    turned = rope(
        x[..., :dim], positions, cfg.theta, divisors=cfg.divisors, magnitude=cfg.magnitude
    )
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], -1)
