"""The MoE layer as a flax linen module."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from moejax.core.structs import MoEMetrics
from moejax.layers.moe import MoEConfig, init_moe, moe


class MoE(nn.Module):
    """`moejax.layers.moe` with its weights as one parameter `moe`, a `MoEParams`.

    >>> layer = MoE(cfg)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, metrics = layer.apply(variables, x)

    Inside `shard_map`, where linen would compare local with global shapes, call `moejax.layers.moe`
    on `variables["params"]["moe"]` instead.
    """

    cfg: MoEConfig
    out_scale: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEMetrics]:
        """y [..., D] of x [..., D], and the metrics of the layer with its auxiliary losses."""
        d_model, dtype = x.shape[-1], jnp.dtype(self.dtype)

        def init(key: jax.Array):
            return init_moe(key, d_model, self.cfg, out_scale=self.out_scale, dtype=dtype)

        y, _, _, metrics = moe(self.param("moe", init), x.reshape(-1, d_model), self.cfg)
        return y.reshape(x.shape), metrics
