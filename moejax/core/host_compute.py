"""Computing on the host's own processor, on arrays that stay in host memory.

`compute_on` makes XLA run a part of a program on the host, asynchronously where the backend can
(TPU and GPU schedule a start and a done; on CPU the part runs in line). What is missing is a way to
mix operands: jax types every array by its memory and refuses to multiply a host matrix with device
rows, even inside such a part, where both are at hand. `_as_device` changes the type alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import mlir

from moejax.core.compat import DEVICE, compute_on

_as_device = jex_core.Primitive("as_device")
_as_device.def_abstract_eval(lambda aval: aval.update(memory_space=DEVICE))
mlir.register_lowering(_as_device, lambda ctx, operand: [operand])


def on_host(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a part of a jitted program that the host's processor runs. Not differentiable.

    Operands may live in either memory; `fn` sees them as if they were in one, and its results are
    device arrays. Those in host memory are read in place, the others travel: cost is a transfer of
    each device operand to the host and of each result back, and one launch of the host.
    """

    def run(*operands: Any) -> Any:
        return fn(*jax.tree.map(_as_device.bind, operands))

    return compute_on(run, compute_type="device_host", out_memory_spaces=DEVICE)
