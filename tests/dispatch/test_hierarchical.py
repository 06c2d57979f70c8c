"""De-duplicated dispatch over levels: exact values, exact incidences, exact drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.structs import Routing
from moejax.dispatch.hierarchical import expected_rows, hierarchical, send
from moejax.dispatch.slots import FITS_ALL, Capacity
from moejax.experts.stage import reference, resident
from tests.dispatch.cases import E, check_exact, compiled, cube, layout, routings

LAYOUTS = {
    "flat 1x8": (lambda: layout(1, 8), ("expert",)),
    "two levels 2x4": (lambda: layout(2, 4, axis_type="explicit", both=True), ("data", "expert")),
    "collapsed 2x2x2": (cube, ("node", ("board", "chip"))),
    "three levels 2x2x2": (cube, ("node", "board", "chip")),
}


def incidences(idx: np.ndarray, groups: int, num_experts: int = E) -> int:
    """Pairs of a token and a group of experts that it wants."""
    size = num_experts // groups
    return sum(len({e // size for e in row if e < num_experts}) for row in idx.tolist())


def sent_rows(where, levels, idx, capacities, num_experts=E):
    """Rows per level and dropped assignments per level, of all ranks, as measured by `send`."""

    def body(x, idx):
        weights = jnp.ones(idx.shape, jnp.float32)
        routing = Routing(topk_idx=idx, topk_weights=weights, router_logits=weights)
        _, _, sent = send(x, routing, num_experts=num_experts, levels=levels, capacities=capacities)
        return jax.lax.psum((sent.rows, sent.dropped), where.token_axes)

    run = jax.shard_map(body, mesh=where.mesh, in_specs=P(where.token_axes), out_specs=P())
    rows, dropped = jax.jit(run)(np.ones((len(idx), 1), np.float32), idx)
    return rows.tolist(), dropped.tolist()


@pytest.mark.parametrize(
    "name, inner",
    [
        ("flat 1x8", resident),
        ("two levels 2x4", reference),
        ("three levels 2x2x2", reference),
    ],
)
def test_with_room_for_all_it_equals_the_reference(name, inner):
    make_layout, levels = LAYOUTS[name]
    where = make_layout()
    options = {"num_experts": E, "levels": levels, "token_axes": where.token_axes}
    run = compiled(hierarchical(**options, inner=inner), where)
    for idx in routings().values():
        check_exact(run, idx)


@pytest.mark.parametrize(
    "name, groups",
    [
        ("flat 1x8", [8]),
        ("collapsed 2x2x2", [2, 8]),
        ("three levels 2x2x2", [2, 4, 8]),
    ],
)
def test_rows_sent_are_the_incidences(name, groups):
    make_layout, levels = LAYOUTS[name]
    idx = routings()["padding"]
    rows, dropped = sent_rows(make_layout(), levels, idx, (FITS_ALL,) * len(levels))
    assert rows == [incidences(idx, g) for g in groups]
    assert rows[-1] < np.sum(idx < E) and dropped == [0] * len(levels)


def drops(idx, sizes, capacities):
    """bool [T, K] and rows sent per level, by loops over ranks, rows and destinations."""
    ranks = int(np.prod(sizes))
    num_local = E // ranks
    lost = np.zeros(idx.shape, bool)
    holding = [
        [(t, [k for k in range(idx.shape[1]) if idx[t, k] < E]) for t in tokens]
        for tokens in np.split(np.arange(len(idx)), ranks)
    ]
    sent = []
    for level, (size, capacity) in enumerate(zip(sizes, capacities, strict=True)):
        below = int(np.prod(sizes[level + 1 :], dtype=int))
        arrived: list = [[[] for _ in range(size)] for _ in range(ranks)]
        sent.append(0)
        for rank, rows in enumerate(holding):
            mine = rank // below % size
            taken = [0] * size
            for t, choices in rows:
                for group in dict.fromkeys(idx[t, k] // num_local // below % size for k in choices):
                    ks = [k for k in choices if idx[t, k] // num_local // below % size == group]
                    if taken[group] < capacity:
                        target = rank + (group - mine) * below
                        arrived[target][mine].append((t, ks))
                        sent[-1] += 1
                    else:
                        lost[t, ks] = True
                    taken[group] += 1
        holding = [[row for source in sources for row in source] for sources in arrived]
    return lost, sent


def test_drops_are_counted_at_every_level_and_the_rest_is_exact():
    where, levels, slots = cube(), ("node", "board", "chip"), (7, 9, 8)
    capacities = tuple(Capacity(slots=n) for n in slots)
    stage = hierarchical(
        num_experts=E,
        levels=levels,
        token_axes=where.token_axes,
        capacity=capacities,
        inner=reference,
    )
    run = compiled(stage, where)
    for idx in routings().values():
        lost, sent = drops(idx, (2, 2, 2), slots)
        assert lost.sum() > 0
        check_exact(run, idx, dropped=lost)
        rows, dropped = sent_rows(where, levels, idx, capacities)
        assert rows == sent and sum(dropped) == lost.sum()


@pytest.mark.parametrize(
    "groups, percent",
    [
        (32, (2, 4, 7, 9)),
        (16, (3, 9, 14, 18)),
        (8, (6, 17, 27, 34)),
        (4, (12, 32, 46, 55)),
    ],
)
def test_duplication_rates_of_the_paper(groups, percent):
    """HierMoE, table II: uniform routing to 128 experts, K = 2, 4, 6, 8."""
    for top_k, want in zip((2, 4, 6, 8), percent, strict=True):
        rate = 100 * (1 - expected_rows(1, 128, top_k, groups) / top_k)
        assert abs(rate - want) <= 2, (groups, top_k, rate)


def test_duplication_rates_as_measured():
    """Table II for 8 and 4 groups at K = 4, from the rows that the dispatch sends."""
    rng = np.random.default_rng(3)
    idx = np.argsort(rng.random((4096, 128)), axis=1)[:, :4].astype(np.int32)
    for where, levels, want in [
        (layout(1, 8), ("expert",), 17),
        (layout(2, 4), ("expert",), 32),
    ]:
        (rows,), _ = sent_rows(where, levels, idx, (FITS_ALL,), num_experts=128)
        assert abs(100 * (1 - rows / idx.size) - want) <= 2


def test_wrong_input():
    with pytest.raises(InputError, match="2 capacities for 1 levels"):
        hierarchical(num_experts=E, capacity=(FITS_ALL, FITS_ALL))
    with pytest.raises(InputError, match="at least one level"):
        hierarchical(num_experts=E, levels=())
    with pytest.raises(InputError, match="num_experts=12 is not divisible by the 8 ranks"):
        where = layout(1, 8)
        run = compiled(hierarchical(num_experts=12, token_axes=where.token_axes), where)
        check_exact(run, routings()["uniform"])
