"""The grouped product on tokamax (openxla/tokamax), where its kernels run: GPU and TPU."""

import importlib
import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp

from moejax.kernels.grouped_matmul.operands import check_shapes, result_dtype


def load() -> ModuleType:
    """The tokamax module; refuses when it is absent or the default device has no kernel.

    The default device decides, so compiling ahead of time for another one does not pick tokamax.
    """
    platform = jax.default_backend()
    if platform not in ("gpu", "tpu"):
        raise NotImplementedError(f"tokamax has kernels for gpu and tpu, not for {platform}")
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("tokamax is not installed")
    return importlib.import_module("tokamax")


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """See `api.grouped_matmul`. Refuses `group_offset`; tokamax refuses what it has no kernel for.

    tokamax's own fallback on plain XLA is left out: ours is faster.
    """
    check_shapes(lhs, rhs, group_sizes, group_offset)
    tokamax = load()
    if group_offset is not None:
        raise NotImplementedError("tokamax.ragged_dot has no group_offset")
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    sizes = group_sizes.astype(jnp.int32)
    kernels = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}[jax.default_backend()]
    try:
        y = tokamax.ragged_dot(
            lhs, rhs, sizes, preferred_element_type=dtype, implementation=kernels
        )
    except ExceptionGroup as refusals:
        reasons = "; ".join(" ".join(str(error).split()) for error in refusals.exceptions)
        raise NotImplementedError(f"tokamax: {reasons}") from refusals
    used = jnp.arange(lhs.shape[0])[:, None] < jnp.sum(sizes)
    return jnp.where(used, y, 0)
