"""The grouped gated MLP as one loop over chunks of rows, in pure lax: the fallback everywhere.

The three products of a chunk share a loop body, so a chunk's hidden rows never leave the cache, and
each expert's weights are read once per chunk of up to S rows. The loop has a traced trip count,
which jax cannot reverse: the gradient is spelled out (`_backward`).

A row's result depends on the rows of its chunk, the chunk's size and its expert's weights alone:
not on where in the stack the weights lie, nor on the order of the groups.

Axis letters:
    M  rows      G  groups      R  rows of the weight stack      D  model dim      F  hidden dim
    S  largest chunk, sizes[-1]
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.core.errors import check
from moejax.kernels.chunks import (
    ChunkPlan,
    fold_groups,
    gradient_sizes,
    pick_sizes,
    plan_chunks,
    switch_size,
    zero_tail,
)
from moejax.kernels.few_rows import matmul_row
from moejax.kernels.grouped_ffn.by_pair import run_pairs
from moejax.kernels.grouped_ffn.by_row import MAX_ROWS, run_rows
from moejax.kernels.grouped_ffn.weights import (
    GatedWeights,
    check_shapes,
    hidden_fn,
)
from moejax.kernels.quantized import is_quantized
from moejax.kernels.rows import (
    dot_nt,
    dot_tn,
    from_bits,
    pad_rows,
    put,
    read_row,
    refuse_dtypes,
    to_bits,
    window,
)
from moejax.kernels.vma import vary_together


def run_chunks(
    y: jax.Array,
    xs: jax.Array,
    weights: GatedWeights,
    group_rows: jax.Array,
    plan: ChunkPlan,
    begin: jax.Array | int,
    end: jax.Array | int,
    *,
    sizes: tuple[int, ...],
    portable: bool = False,
) -> jax.Array:
    """Computes chunks `[begin, end)` of `plan` into `y`. Forward only.

    `xs` and `y` are [M + S, D]: sorted rows and S rows of padding. `group_rows` (int32 [G]) says
    which row of the weight stack serves a group. Weights are float32, bfloat16, or uint16 that
    holds the bits of bfloat16 (`rows.to_bits`: what a loop on CPU can write to in place), or
    quantised. They may be the carry of an outer loop: they are only read, row by row. Sums are in
    float32.

    A chunk writes S rows; those that are not its own hold rubbish until the next chunk, so chunks
    must be run in order, and `zero_tail` called after the last chunk of all. `portable` keeps to
    what every compiler takes, also where other ways run faster on CPU. Cost: each chunk
    reads its expert once, 3 * D * F weights, and does 6 * D * F operations per row of its size.
    """
    (y,) = _run_chunks((y,), xs, weights, group_rows, plan, begin, end, sizes, portable)
    return y


def grouped_ffn(
    xs: jax.Array,
    weights: GatedWeights,
    group_sizes: jax.Array,
    *,
    group_rows: jax.Array | None = None,
    sizes: tuple[int, ...] | None = None,
) -> jax.Array:
    """`xs` [M, D] sorted by group -> [M, D]; rows past `sum(group_sizes)` are zero.

    Differentiable in `xs` and `weights`, unless these are quantised. The gradient keeps gate and up
    rows, 2 * M * F in the dtype of `xs`. `sizes` overrides `pick_sizes(M)`.
    """
    check_shapes(xs, weights, group_sizes, group_rows)
    refuse_dtypes(xs=xs, w_gate=weights.w_gate, w_up=weights.w_up, w_down=weights.w_down)
    hidden_fn(weights.activation)
    sizes = sizes or pick_sizes(xs.shape[0])
    xs, weights, group_sizes, group_rows = vary_together(xs, weights, group_sizes, group_rows)
    return _grouped_ffn(xs, weights, group_sizes, group_rows, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_ffn(xs, weights, group_sizes, group_rows, sizes):
    return _forward(xs, weights, group_sizes, group_rows, sizes, keep=False)[0]


def _forward(xs, weights, group_sizes, group_rows, sizes, *, keep):
    """Output [M, D] and, with `keep`, the gate and up rows [M + S, F] that the gradient wants."""
    num_rows, d_model = xs.shape
    plan = plan_chunks(group_sizes, sizes=sizes, num_rows=num_rows)
    widths = [d_model] + [weights.w_gate.shape[2]] * 2 * keep
    zeros = tuple(jnp.zeros((num_rows + sizes[-1], width), xs.dtype) for width in widths)
    zeros, _ = vary_together(zeros, xs)
    padded = pad_rows(xs, num_rows + sizes[-1])
    y, *kept = _run_chunks(zeros, padded, weights, group_rows, plan, 0, plan.num_chunks, sizes)
    return zero_tail(y, jnp.sum(group_sizes), sizes=sizes)[:num_rows], kept


def _run_chunks(out, xs, weights, group_rows, plan, begin, end, sizes, portable=False):
    """`out` is (y,) or (y, gate, up), each [M + S, *]."""
    bits = tuple(to_bits(o) for o in out)
    by_chunk, by_pair = partial(_by_chunk, sizes=sizes), partial(_by_pair, sizes=sizes)
    operands = (bits, xs, weights, group_rows, plan, begin, end)
    with jax.named_scope("grouped_ffn"):
        if portable:
            bits = by_chunk(*operands)
        else:
            on_cpu = run_rows if xs.shape[0] - sizes[-1] <= MAX_ROWS else by_pair
            bits = lax.platform_dependent(*operands, cpu=on_cpu, default=by_chunk)
        return tuple(from_bits(b, o.dtype) for b, o in zip(bits, out, strict=True))


def _by_pair(out, xs, weights, group_rows, plan, begin, end, *, sizes):
    """As `_by_chunk`, in pairs where there are two chunks of one size."""

    def run_singles(out, chunk_of, count):
        return _by_chunk(
            out, xs, weights, group_rows, plan, 0, count, sizes=sizes, chunk_of=chunk_of
        )

    return run_pairs(
        out, xs, weights, group_rows, plan, begin, end, sizes=sizes, run_singles=run_singles
    )


def _by_chunk(out, xs, weights, group_rows, plan, begin, end, *, sizes, chunk_of=lambda i: i):
    """The bits of `out` with chunks `[begin, end)` computed, each a product of all its rows."""
    hidden = hidden_fn(weights.activation)
    keep = len(out) > 1

    def branch(size):
        def run(start, row):
            x = window(xs, start, size).astype(jnp.float32)
            gate = _add_row(matmul_row(x, weights.w_gate, row), weights.b_gate, row)
            up = _add_row(matmul_row(x, weights.w_up, row), weights.b_up, row)
            y = _add_row(matmul_row(hidden(gate, up), weights.w_down, row), weights.b_down, row)
            results = (y, gate, up) if keep else (y,)
            return tuple(pad_rows(to_bits(r.astype(xs.dtype)), sizes[-1]) for r in results)

        return run

    def body(i, out):
        chunk = chunk_of(i)
        group, start = plan.group[chunk], plan.row[chunk]
        row = group if group_rows is None else group_rows[group]
        # The update stands outside the switch: a conditional that returns `out` would copy it.
        results = switch_size(plan.size_class[chunk], sizes, branch, start, row)
        return tuple(put(o, r, start) for o, r in zip(out, results, strict=True))

    return lax.fori_loop(begin, end, body, out)


def _add_row(rows, biases, row):
    return rows if biases is None else rows + read_row(biases, row)[None]


def _grouped_ffn_fwd(xs, weights, group_sizes, group_rows, sizes):
    check(not is_quantized(weights), "quantised experts have no gradient; dequantise them to train")
    y, kept = _forward(xs, weights, group_sizes, group_rows, sizes, keep=True)
    return y, (xs, weights, group_sizes, group_rows, *kept)


def _grouped_ffn_bwd(sizes, residuals, dy):
    xs, weights, group_sizes, group_rows, gate, up = residuals
    num_rows, sizes = xs.shape[0], gradient_sizes(sizes)
    plan = plan_chunks(group_sizes, sizes=sizes, num_rows=num_rows)
    # The rows of dy turn into rows of dx one by one, in place.
    grad_rows = pad_rows(dy, num_rows + sizes[-1])
    padded = pad_rows(xs, num_rows + sizes[-1])
    chunk = partial(_chunk_grad, padded, gate, up, weights)
    grad_weights, _ = vary_together(jax.tree.map(jnp.zeros_like, weights), xs)
    with jax.named_scope("grouped_ffn_grad"):
        grad_rows, grad_weights = fold_groups(
            plan, group_sizes, sizes, chunk, grad_rows, grad_weights, group_rows
        )
    used = jnp.arange(num_rows)[:, None] < jnp.sum(group_sizes)
    return jnp.where(used, grad_rows[:num_rows], 0), grad_weights, None, None


def _chunk_grad(xs, gate, up, weights, size, grad, start, rows, row):
    """Gradients of one chunk: dx [size, D] and this chunk's share of the weights' gradient.

    Rows of the window past the chunk's own `rows` belong to other experts. They are masked in
    every factor, not only in dy, because 0 * inf would reach the weights' gradient.
    """
    own = (jnp.arange(size) < rows)[:, None]
    x, gate, up = (
        jnp.where(own, window(a, start, size).astype(jnp.float32), 0) for a in (xs, gate, up)
    )
    dy = jnp.where(own, grad[:size].astype(jnp.float32), 0)
    hidden, hidden_vjp = jax.vjp(hidden_fn(weights.activation), gate, up)
    d_gate, d_up = hidden_vjp(dot_nt(dy, read_row(weights.w_down, row)))
    # Other experts' rows are zero in `hidden`, and so are their d_gate and d_up, since dy is.
    biases = {}
    if weights.b_gate is not None:
        biases = dict(b_gate=d_gate.sum(0), b_up=d_up.sum(0), b_down=dy.sum(0))
    dx = dot_nt(d_gate, read_row(weights.w_gate, row))
    dx += dot_nt(d_up, read_row(weights.w_up, row))
    grads = GatedWeights(
        w_gate=dot_tn(x, d_gate),
        w_up=dot_tn(x, d_up),
        w_down=dot_tn(hidden, dy),
        **biases,
        activation=weights.activation,
    )
    return dx, grads


_grouped_ffn.defvjp(_grouped_ffn_fwd, _grouped_ffn_bwd)
