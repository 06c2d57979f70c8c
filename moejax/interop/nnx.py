"""The MoE layer as a flax nnx module."""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.core.structs import MoEMetrics
from moejax.layers.moe import MoEConfig, MoEParams, init_moe, moe


class MoE(nnx.Module):
    """`moejax.layers.moe` with every weight an `nnx.Param`; call it on x [..., D].

    >>> layer = MoE(64, cfg, rngs=nnx.Rngs(0))
    >>> y, metrics = layer(x)
    """

    def __init__(
        self,
        d_model: int,
        cfg: MoEConfig,
        *,
        out_scale: float = 1.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        params = init_moe(rngs.params(), d_model, cfg, out_scale=out_scale, dtype=jnp.dtype(dtype))
        self.params = nnx.data(jax.tree.map(nnx.Param, params))
        self.cfg = cfg

    def unwrapped(self) -> MoEParams:
        """The weights as the struct that the functions of moejax take."""
        is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=is_param)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEMetrics]:
        """y [..., D] and the metrics of the layer, its auxiliary losses among them."""
        y, _, _, metrics = moe(self.unwrapped(), x.reshape(-1, x.shape[-1]), self.cfg)
        return y.reshape(x.shape), metrics
