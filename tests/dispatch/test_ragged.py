"""Ragged dispatch, emulated on CPU: exact values, an exact count when the buffer is full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.dispatch.ragged import Pieces, cut_pieces, ragged, ragged_exchange
from moejax.dispatch.slots import Capacity
from moejax.experts.stage import reference
from tests.dispatch.cases import E, check_exact, compiled, layout, routings


def test_with_room_for_all_it_equals_the_reference():
    where = layout(1, 8)
    run = compiled(ragged(num_experts=E, token_axes=where.token_axes), where)
    for idx in routings().values():
        check_exact(run, idx)


def overflow(idx: np.ndarray, ranks: int, groups: int, rows: int) -> np.ndarray:
    """bool [T, K]: choices past `rows` of their receiver, by sender, expert, token; by loops."""
    lost, num_local = np.zeros(idx.shape, bool), E // ranks
    tokens_each = len(idx) // groups // ranks
    for group in range(groups):
        for receiver in range(ranks):
            order = []
            for sender in range(ranks):
                first = (group * ranks + sender) * tokens_each
                tokens = range(first, first + tokens_each)
                pairs = [(idx[t, k], t, k) for t in tokens for k in range(idx.shape[1])]
                order += sorted(p for p in pairs if p[0] < E and p[0] // num_local == receiver)
            for _, t, k in order[rows:]:
                lost[t, k] = True
    return lost


def test_a_full_buffer_drops_the_last_and_counts_them():
    where = layout(2, 4)
    stage = ragged(
        num_experts=E,
        token_axes=where.token_axes,
        capacity=Capacity(slots=24),
        inner=reference,
    )
    run = compiled(stage, where)
    for idx in routings().values():
        lost = overflow(idx, ranks=4, groups=2, rows=24)
        assert lost.any()
        check_exact(run, idx, dropped=lost)


def test_the_exchange_lays_pieces_end_to_end():
    sizes = np.array([[1, 0, 2], [0, 3, 1], [2, 2, 0]], np.int32)
    mesh = make_mesh(expert=3)

    def body(x):
        return ragged_exchange(x, cut_pieces(jnp.asarray(sizes), 4), 4, "expert")

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    x = 1 + np.arange(12, dtype=np.float32).reshape(12, 1)  # 4 rows on each rank
    # Rank 0 gets 1 row of rank 0 and 2 of rank 2; rank 1 is offered 5 rows and takes 4.
    want = [[1, 9, 10, 0], [5, 6, 7, 11], [2, 3, 8, 0]]
    np.testing.assert_array_equal(run(x).reshape(3, 4), want)


def _pieces_over(lowering, mesh):
    """Values and gradient of an exchange of 128 columns over `expert`, in two groups."""
    sizes = np.array([[1, 4], [3, 2]], np.int32)

    def body(x):
        return ragged_exchange(x, cut_pieces(jnp.asarray(sizes), 5), 5, "expert", lowering)

    spec = P(("data", "expert"))
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)

    def both(x):
        y, pullback = jax.vjp(run, x)
        return y, pullback(jnp.cos(y))

    return both


def test_by_dma_pieces_are_the_same():
    mesh = make_mesh(data=2, expert=2)
    x = np.random.default_rng(0).standard_normal((20, 128)).astype(np.float32)
    fns = [_pieces_over(lowering, mesh) for lowering in ("dma", "emulated")]
    got, want = jax.jit(lambda x: [fn(x) for fn in fns])(x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_native_lowers_to_one_ragged_all_to_all():
    mesh = make_mesh(expert=4)

    def body(x):
        pieces = cut_pieces(jnp.ones((4, 4), jnp.int32), 4)
        return ragged_exchange(x, pieces, 4, "expert", "native")

    run = jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    text = jax.jit(run).lower(jnp.ones((16, 2))).as_text()
    assert text.count("ragged_all_to_all") == 1


def test_reversed_pieces_come_home():
    pieces = cut_pieces(jnp.asarray([[1, 2], [3, 0]], jnp.int32), 9)
    back = pieces.reversed()
    assert isinstance(back, Pieces)
    np.testing.assert_array_equal(back.sizes, [[1, 3], [2, 0]])
    np.testing.assert_array_equal(back.sent_at, [[0, 1], [0, 2]])
    np.testing.assert_array_equal(back.lands_at, [[0, 0], [1, 3]])


def test_wrong_input():
    with pytest.raises(InputError, match="lowering='tcp' is not one of"):
        ragged(num_experts=E, lowering="tcp")  # pyrefly: ignore[bad-argument-type]
