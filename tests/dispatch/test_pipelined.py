"""Chunks change no value; their collectives do not wait for each other."""

import pytest

from moejax.core.errors import InputError
from moejax.dispatch.all_to_all import all_to_all
from moejax.dispatch.pipelined import pipelined
from moejax.dispatch.slots import Capacity
from moejax.experts.stage import reference
from tests.dispatch.cases import E, check_exact, compiled, first_come, layout, routings


def test_chunks_equal_the_reference_and_have_capacities_of_their_own():
    where = layout(2, 4)
    stage = all_to_all(
        num_experts=E,
        token_axes=where.token_axes,
        capacity=Capacity(slots=2),
        inner=reference,
    )
    run = compiled(pipelined(stage, num_chunks=2), where)
    for idx in routings().values():
        # The first half of every rank's tokens is one chunk.
        metrics = check_exact(run, idx, dropped=first_come(idx, idx, 2, ranks=16))
        assert metrics.waves == 2


def test_wrong_input():
    with pytest.raises(InputError, match="num_chunks=0 must be at least 1"):
        pipelined(all_to_all(num_experts=E), num_chunks=0)
    where = layout(1, 8)
    stage = all_to_all(num_experts=E, token_axes=where.token_axes)
    with pytest.raises(InputError, match="8 tokens of a rank are not divisible by num_chunks=3"):
        check_exact(compiled(pipelined(stage, num_chunks=3), where), routings()["uniform"])
