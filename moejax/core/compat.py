"""Version shims: everything that differs between the jax versions we support, in one place."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on as _compute_on

JAX_VERSION: tuple[int, ...] = tuple(int(p) for p in jax.__version__.split(".")[:3])

# jax 0.10.2 and 0.11.0: `compute_on2(f, compute_type=..., out_memory_spaces=...)` wraps a function
# and `compute_on` is a context manager. From 0.11.1 `compute_on` is the wrapper and `compute_on2`
# is gone.
compute_on: Callable[..., Any] = getattr(_compute_on, "compute_on2", _compute_on.compute_on)

HOST = jax.memory.Space.Host
DEVICE = jax.memory.Space.Device


def cheap_cpu_options(level: int, *, exact: bool = False) -> dict[str, bool | int]:
    """XLA options with which a CPU program compiles fast; `level` is LLVM's, 0 to 3.

    At level 0 it compiles in a fifth of the time and runs several times slower. From jax 0.11 XLA
    has only the newer emitters, and refuses the option that chooses the older. With those it rounds
    a product's sum differently from program to program; `exact` keeps the newer ones, for programs
    that are compared bit by bit.
    """
    options: dict[str, bool | int] = {"xla_backend_optimization_level": level}
    if JAX_VERSION < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = exact
    return options


def host_slices_are_sound(platform: str) -> bool:
    """False where compiled slices of host memory may read wrong rows.

    CUDA jaxlib 0.10.2 and 0.11.0 compute wrong addresses when the slice index is a non-identity
    function of a loop counter (fixed in 0.11.1). Indices that come from routing are not affected,
    but a streaming scan that prefetches layer i+1 is.
    """
    return platform not in ("cuda", "gpu") or JAX_VERSION >= (0, 11, 1)
