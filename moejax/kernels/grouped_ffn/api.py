"""Gated MLP of every expert over rows sorted by expert: picks the implementation.

Axis letters:
    M  rows      G  groups      R  rows of the weight stack      D  model dim      F  hidden dim
"""

import dataclasses
from typing import Any

import jax

from moejax.kernels.grouped_ffn import blocked, reference, tokamax
from moejax.kernels.grouped_ffn.weights import Activation, GatedWeights
from moejax.kernels.pick import Choice, Implementation, explain_first, run_first

# In order of preference; `reference` costs G times the work.
BACKENDS = {
    "tokamax": tokamax.grouped_ffn,
    "blocked": blocked.grouped_ffn,
    "reference": reference.grouped_ffn,
}


def grouped_ffn(
    xs: jax.Array,
    weights: GatedWeights,
    group_sizes: jax.Array,
    *,
    group_rows: jax.Array | None = None,
    activation: Activation | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """The gated MLP of each row's group, `hidden(x @ w_gate, x @ w_up) @ w_down` and biases.

    `xs` is [M, D], its first `group_sizes[0]` rows belong to group 0 and so on; the result is
    [M, D] in the dtype of `xs`, accumulated in float32. Rows past `sum(group_sizes)` are zero and
    get zero gradient; empty groups cost nothing. Group g is served by row g of the weights, or by
    row `group_rows[g]` (int32 [G]). `activation` is that of the weights unless given.
    `implementation` is a name, names in order of preference, or
    None for the best that is willing (`explain` says which). Raises `InputError` when shapes or
    names are wrong, `NotImplementedError` with every reason when all backends refuse.
    """
    if activation is not None:
        weights = dataclasses.replace(weights, activation=activation)
    options = {"group_rows": group_rows}
    operands = (xs, weights, group_sizes)
    y, _ = run_first("grouped_ffn", BACKENDS, implementation, *operands, **options)
    return y


def explain(*args: Any, implementation: Implementation = None, **kwargs: Any) -> Choice:
    """What `grouped_ffn` would pick for these operands (or ShapeDtypeStructs), and why."""
    return explain_first("grouped_ffn", BACKENDS, implementation, *args, **kwargs)
