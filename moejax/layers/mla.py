"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A position keeps one latent vector and one rotated key, shared by all heads. Keys and values are
linear in the latent, so their projections are absorbed into the query and the output: the cache is
read as it is, by H queries of R + r dims, and never expanded to heads.

Axis letters:
    B  batch    S  new positions    C  positions of the cache    H  heads    D  model dim
    R  latent dim    r  rotated dims    N  dims that are not rotated    V  value dim of a head
    Q  latent dim of queries
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from moejax.core.errors import check
from moejax.layers.norm import rms_norm
from moejax.layers.rope import RopeConfig, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Static description of one latent attention layer.

    Attributes:
        kv_rank, q_rank: latent dims, R and Q; a q_rank of 0 projects queries directly.
        nope_dim, rope_dim, v_dim: N, r and V.
        scale: of the scores, None for `(N + r) ** -0.5`.
        q_scale, kv_scale: factors of the queries and of the latent (LongCat-Flash).
    """

    num_heads: int
    kv_rank: int
    q_rank: int = 0
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    scale: float | None = None
    q_scale: float = 1.0
    kv_scale: float = 1.0

    def __post_init__(self):
        for name in ("num_heads", "kv_rank", "nope_dim", "rope_dim", "v_dim"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.q_rank >= 0, f"q_rank={self.q_rank} must not be negative")
        check(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even")
        self.rope.check_fits(self.rope_dim)

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return 1

    @property
    def cache_dims(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, dims) of what a position keeps: its latent and its rotated key."""
        return (1, self.kv_rank), (1, self.rope_dim)


@struct.dataclass(kw_only=True)
class MLAParams:
    """Weights of one latent attention layer; `w_q_down` and `q_norm` are None without `q_rank`."""

    w_q_down: jax.Array | None = None  # [D, Q]
    q_norm: jax.Array | None = None  # [Q]
    w_q: jax.Array  # [Q or D, H, N + r]
    w_kv_down: jax.Array  # [D, R + r]
    kv_norm: jax.Array  # [R]
    w_k: jax.Array  # [R, H, N]
    w_v: jax.Array  # [R, H, V]
    w_o: jax.Array  # [H, V, D]


def init_mla(
    key: jax.Array, d_model: int, cfg: MLAConfig, *, out_scale: float, dtype: jnp.dtype
) -> MLAParams:
    """Normal weights of variance 1 / fan-in; `out_scale` shrinks the residual branch."""
    h, rank, q_in = cfg.num_heads, cfg.kv_rank, cfg.q_rank or d_model

    def normal(name: int, shape: tuple[int, ...], std: float) -> jax.Array:
        return (jax.random.normal(jax.random.fold_in(key, name), shape) * std).astype(dtype)

    return MLAParams(
        w_q_down=normal(0, (d_model, cfg.q_rank), d_model**-0.5) if cfg.q_rank else None,
        q_norm=jnp.ones((cfg.q_rank,), dtype) if cfg.q_rank else None,
        w_q=normal(1, (q_in, h, cfg.nope_dim + cfg.rope_dim), q_in**-0.5),
        w_kv_down=normal(2, (d_model, rank + cfg.rope_dim), d_model**-0.5),
        kv_norm=jnp.ones((rank,), dtype),
        w_k=normal(3, (rank, h, cfg.nope_dim), rank**-0.5),
        w_v=normal(4, (rank, h, cfg.v_dim), rank**-0.5),
        w_o=normal(5, (h, cfg.v_dim, d_model), out_scale * (h * cfg.v_dim) ** -0.5),
    )


def project(
    params: MLAParams, x: jax.Array, positions: jax.Array, cfg: MLAConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, S, H, R + r], latents [B, S, 1, R] and rotated keys [B, S, 1, r] of x."""
    narrow = x
    if params.w_q_down is not None and params.q_norm is not None:
        narrow = rms_norm(x @ params.w_q_down, params.q_norm, cfg.norm_eps)
    q = jnp.einsum("bsq,qhe->bshe", narrow, params.w_q) * jnp.asarray(cfg.q_scale, x.dtype)
    q_nope, q_rope = q[..., : cfg.nope_dim], q[..., cfg.nope_dim :]
    absorbed = jnp.einsum("bshn,rhn->bshr", q_nope, params.w_k)
    both = x @ params.w_kv_down
    latent = rms_norm(both[..., : cfg.kv_rank], params.kv_norm, cfg.norm_eps)
    latent = latent * jnp.asarray(cfg.kv_scale, x.dtype)
    k_rope = rotate(both[..., None, cfg.kv_rank :], positions, cfg.rope)
    q = jnp.concatenate([absorbed, rotate(q_rope, positions, cfg.rope)], -1)
    return q, latent[:, :, None], k_rope


def attend(
    params: MLAParams,
    q: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    visible: jax.Array,
    cfg: MLAConfig,
) -> jax.Array:
    """Softmax attention over latents and output projection.

    Args:
        q: [B, S, H, R + r]; latent: [B, C, 1, R]; k_rope: [B, C, 1, r].
        visible: bool [B or 1, S, C].

    Returns: [B, S, D]. Scores and softmax are float32.
    Cost: a position of the cache is R + r numbers, whatever the number of heads.
    """
    scale = (cfg.nope_dim + cfg.rope_dim) ** -0.5 if cfg.scale is None else cfg.scale
    keys = jnp.concatenate([latent, k_rope], -1)[:, :, 0]  # [B, C, R + r]
    scores = jnp.einsum("bshr,bcr->bhsc", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None], scores * scale, -1e30)
    probs = jax.nn.softmax(scores, axis=-1).astype(latent.dtype)
    mixed = jnp.einsum("bhsc,bcr->bshr", probs, latent[:, :, 0])
    return jnp.einsum("bshr,rhv,hvd->bsd", mixed, params.w_v, params.w_o)
