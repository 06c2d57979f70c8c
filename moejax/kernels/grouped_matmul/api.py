"""Matrix product of rows sorted by group with their group's matrix: picks the implementation.

Axis letters:
    M  rows      K  inner dim      N  outer dim      G  groups of rhs      Gtot  groups of all rows
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels.grouped_matmul import blocked, ragged_dot, reference, tokamax
from moejax.kernels.pick import Choice, Implementation, explain_first, run_first

# In order of preference; the last two cost G times the work on CPU.
BACKENDS = {
    "tokamax": tokamax.grouped_matmul,
    "blocked": blocked.grouped_matmul,
    "ragged_dot": ragged_dot.grouped_matmul,
    "reference": reference.grouped_matmul,
}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    preferred_element_type: jnp.dtype | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """`lhs` [M, K] times `rhs` [G, K, N] -> [M, N], each row with the matrix of its group.

    The first `group_sizes[0]` rows belong to group 0 and so on. Rows past `sum(group_sizes)` are
    zero and get zero gradient; empty groups cost nothing; sums are in float32. The result has
    `preferred_element_type`, or the wider dtype of the operands. With `group_offset` (int32 []),
    `group_sizes` [Gtot] covers all groups while `rhs` holds groups offset .. offset + G; rows of
    the others are zero. `implementation` is a name, names in order of preference, or None for the
    best that is willing (`explain` says which). Raises `InputError` when shapes or names are
    wrong, `NotImplementedError` with every reason when all backends refuse.
    """
    y, _ = run_first(
        "grouped_matmul",
        BACKENDS,
        implementation,
        lhs,
        rhs,
        group_sizes,
        group_offset=group_offset,
        preferred_element_type=preferred_element_type,
    )
    return y


def explain(*args: Any, implementation: Implementation = None, **kwargs: Any) -> Choice:
    """What `grouped_matmul` would pick for these operands (or ShapeDtypeStructs), and why."""
    return explain_first("grouped_matmul", BACKENDS, implementation, *args, **kwargs)
