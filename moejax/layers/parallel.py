"""How a layer's arrays are split over mesh axes, for code inside `shard_map`.

Tokens are split over `token_axes`. Heads and hidden dims are split over `model_axis`: columns of
the first product, rows of the second, one sum after attention and one after the MLP (Megatron-LM,
arXiv 1909.08053, section 3). Weights that are split over token axes too, to save memory, are made
whole for one layer at a time by `unshard` (ZeRO-3, arXiv 1910.02054).

Axis letters:
    T  tokens of this rank    D  model dim    M  ranks on the model axis
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moejax.kernels.vma import vary_over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """What a model must know of the mesh that it runs on.

    Attributes:
        token_axes: mesh axes that tokens are split over; load and losses are those of all tokens.
        model_axis: mesh axis that heads and hidden dims are split over.
        unshard: gives the weights of a layer (or of the model, without its groups) whole over
            the token axes.
    """

    token_axes: tuple[str, ...] = ()
    model_axis: str | None = None
    unshard: Callable[[Any], Any] = lambda params: params

    def split(self, x: jax.Array) -> jax.Array:
        """x, the same on all ranks of the model axis, for use with weights that differ.

        Cost: nothing; in the backward pass one all-reduce of x over M ranks.
        """
        return x if self.model_axis is None else vary_over((self.model_axis,), x)

    def merge(self, x: jax.Array) -> jax.Array:
        """The sum of partial results. Cost: one all-reduce of x over M ranks; nothing backward."""
        return x if self.model_axis is None else jax.lax.psum(x, self.model_axis)


ALONE = Parallel()
