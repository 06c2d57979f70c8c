"""Version shims: everything that differs between the jax versions we support, in one place."""

import jax
from jax.experimental import compute_on as _compute_on

JAX_VERSION: tuple[int, ...] = tuple(int(p) for p in jax.__version__.split(".")[:3])

# jax 0.10.2 and 0.11.0: `compute_on2(f, compute_type=..., out_memory_spaces=...)` wraps a function
# and `compute_on` is a context manager. From 0.11.1 `compute_on` is the wrapper and `compute_on2`
# is gone.
compute_on = getattr(_compute_on, "compute_on2", None) or _compute_on.compute_on

HOST = jax.memory.Space.Host
DEVICE = jax.memory.Space.Device


def host_slices_are_sound(platform: str) -> bool:
    """False where compiled slices of host memory may read wrong rows.

    CUDA jaxlib 0.10.2 and 0.11.0 compute wrong addresses when the slice index is a non-identity
    function of a loop counter (fixed in 0.11.1). Indices that come from routing are not affected,
    but a streaming scan that prefetches layer i+1 is.
    """
    return platform not in ("cuda", "gpu") or JAX_VERSION >= (0, 11, 1)
