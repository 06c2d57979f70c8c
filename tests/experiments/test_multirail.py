"""The simulated episode: near the best at all times, with few programs, and sums that are right."""

import statistics

import pytest

from experiments.multirail import PHASES, compile_split, draw, simulate


@pytest.fixture(scope="module")
def records():
    return [simulate(256 * 2**20, 0.05, seed) for seed in range(10)]


def test_shares_stay_near_the_best(records):
    for run in records:
        assert len(run) == sum(phase.steps for phase in PHASES)
        for phase in PHASES:
            ratios = [record["ratio"] for record in run if record["phase"] == phase.name]
            assert 1 <= statistics.median(ratios) <= 1.15, phase.name
        assert len({record["shares"] for record in run}) <= 6


def test_congestion_and_death_move_shares(records):
    for run in records:
        last = {record["phase"]: record["shares"] for record in run}
        assert last["calm"][0] >= 9 > last["congested"][0]
        assert last["dead"][1] == 0 < last["back"][1]


def test_a_split_is_compiled_and_checked():
    compile_split((9, 6, 1))


def test_the_picture_is_a_picture(records, tmp_path):
    draw(records[0], str(tmp_path / "shares.png"))
    assert (tmp_path / "shares.png").read_bytes()[:4] == b"\x89PNG"
