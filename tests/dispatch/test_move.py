"""Where the experts of a move come from, and what a round of it puts on the wire."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot.collectives import collectives
from moejax.aot.hlo import parse_hlo
from moejax.core.mesh import make_mesh
from moejax.dispatch.move import move_rows, sources
from moejax.placement.build import from_phys_to_log

RANKS = 4


def test_sources_are_near_where_they_can_be():
    rows = [
        [0, 1, 2, 3, 0, 1, 2, 4, 0, 3, 1, 4],
        [1, 0, 2, 0, 1, 3, 4, 0, 2, 1, 3, 4],
        [0, 1, 2, 4, 3, 1, 0, 2, 1, 0, 3, 2],
    ]
    every = [from_phys_to_log(row, num_experts=5, ranks=RANKS, twice_on_rank=True) for row in rows]
    run = jax.jit(partial(sources, ranks=RANKS))
    for old in every:
        for new in every:
            got = np.asarray(run(old, new))
            np.testing.assert_array_equal(old.phys_to_log[got], new.phys_to_log)
            for slot, source in enumerate(got):
                expert = new.phys_to_log[slot]
                copies = np.flatnonzero(old.phys_to_log == expert)
                if slot in copies:
                    assert source == slot
                elif (copies // 3 == slot // 3).any():
                    assert source // 3 == slot // 3
    # Copies that are far from all that want them are asked in turn.
    old = from_phys_to_log([0, 1, 2, 0, 3, 2, 4, 3], num_experts=5, ranks=RANKS)
    new = from_phys_to_log([4, 1, 4, 2, 0, 3, 0, 1], num_experts=5, ranks=RANKS)
    assert run(old, new)[jnp.array([4, 6])].tolist() == [0, 3]


@pytest.mark.parametrize("num_slots, dim, pieces", [(8, 5, 1), (64, 6, 3)])
def test_a_round_is_one_expert_per_pair_of_ranks(num_slots, dim, pieces):
    mesh = make_mesh(expert=RANKS)
    run = jax.shard_map(
        partial(move_rows, axis="expert"),
        mesh=mesh,
        in_specs=(P("expert"), P()),
        out_specs=P("expert"),
    )
    rows = jax.ShapeDtypeStruct((num_slots, dim, 3), jnp.float32)
    source = jax.ShapeDtypeStruct((num_slots,), jnp.int32)
    text = jax.jit(run).lower(rows, source).compile().as_text()
    assert text is not None
    module = parse_hlo(text)
    (found,) = collectives(module, mesh)
    assert (found.kind, found.nbytes) == ("all-to-all", RANKS * dim * 3 * 4 // pieces)
    assert found.computation != module.entry  # in the loop over rounds


def test_rows_arrive_whatever_the_ranks_want():
    """Nothing; a swap of ranks; all from one slot."""
    mesh = make_mesh(expert=RANKS)
    run = jax.jit(
        jax.shard_map(
            partial(move_rows, axis="expert"),
            mesh=mesh,
            in_specs=(P("expert"), P()),
            out_specs=P("expert"),
        )
    )
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    for source in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 6, 7, 4, 5, 2, 3], [5, 5, 5, 5, 5, 5, 4, 5]):
        np.testing.assert_array_equal(run(rows, np.asarray(source, np.int32)), rows[source])
