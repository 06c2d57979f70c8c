"""The benchmark's bytes agree with the compiled programs; its table and picture are written."""

import pytest

from experiments.bench.collectives import (
    FACTORS,
    chunk_elements,
    draw,
    int8_over_slices,
    measure,
    schedules,
    table_of,
)


def test_bytes_in_programs_are_those_of_schedules(monkeypatch, tmp_path):
    chosen = ("native_all_gather", "ring_reduce_scatter", "hierarchical_int8")
    some = {name: one for name, one in schedules().items() if name in chosen}
    monkeypatch.setattr("experiments.bench.collectives.schedules", lambda: some)
    times, facts = measure(4096, rounds=3)
    assert set(times) == {*chosen, "ragged_all_to_all"}
    for name in chosen:
        assert facts[name]["bytes_in_hlo"] == facts[name]["bytes_checked"], name
        assert facts[name]["nbytes"] == 4096
    assert facts["ragged_all_to_all"]["bytes_in_hlo"]["data"] > 0
    records = [
        {"name": name, **fact, "seconds": 1.0, "algbw": 1.0, "busbw": 2.0}
        for name, fact in facts.items()
    ]
    assert len(table_of(records).splitlines()) == 5
    draw(records, str(tmp_path / "bandwidth.png"))
    assert (tmp_path / "bandwidth.png").read_bytes()[:4] == b"\x89PNG"


def test_every_operation_has_a_native_one_or_ours():
    operations = {operation for operation, _ in schedules().values()}
    assert operations == set(FACTORS)
    assert all(chunk_elements(one, 2**10) >= 1 for _, one in schedules().values())


def test_int8_over_two_slices():
    figures = int8_over_slices()
    assert figures["cross_slice_reduction"] == pytest.approx(1024 / 258, rel=1e-6)
    assert figures["ranks_identical"] and 0.001 < figures["relative_error"] < 0.01
