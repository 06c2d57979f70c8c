"""Islands agree to the bit, go on when one dies, leader included, and take in a new one."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from moejax.core.errors import InputError
from moejax.elastic.islands import Card, Island, IslandConfig

ROOT = pathlib.Path(__file__).parents[2]


def _start(folder, name, target, rounds, dies=-1, first=""):
    command = [sys.executable, "-m", "tests.elastic.island_child"]
    return subprocess.Popen(
        [*command, *map(str, (folder, name, target, rounds, dies, first))],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("victim", ["a", "c"])
def test_a_killed_island_stops_nobody_and_a_new_one_joins(tmp_path, victim):
    folder, rounds = tmp_path / "cards", 12
    targets = {"a": 1.0, "b": 2.0, "c": 3.0}
    running = {
        name: _start(folder, name, target, rounds, 3 if name == victim else -1, "abc")
        for name, target in targets.items()
    }
    assert running.pop(victim).wait(120) == -signal.SIGKILL
    running["d"] = _start(folder, "d", 4.0, rounds)
    outputs = {name: child.communicate(timeout=240)[0] for name, child in running.items()}
    assert all(child.returncode == 0 for child in running.values()), outputs
    results = {name: json.loads((tmp_path / f"{name}.out").read_text()) for name in running}
    last = {result["seen"][str(rounds)] for result in results.values()}
    assert len(last) == 1 and all(result["same"] for result in results.values())
    for name, result in results.items():
        for revision, checksum in result["seen"].items():
            others = [other["seen"].get(revision, checksum) for other in results.values()]
            assert others == [checksum] * len(others), (name, revision)
    # Those that are left, and the new one, from its first rounds on.
    want = sum(({**targets, "d": 4.0})[name] for name in results) / len(results)
    first = min(int(revision) for revision in results["d"]["seen"])
    assert first <= rounds // 2 + 1 and abs(results["d"]["weights"] - want) < 0.2


def test_one_island_alone_is_its_own_leader(tmp_path):
    island = Island(IslandConfig(folder=str(tmp_path), name="only"))
    outer = island.join(jnp.zeros(4))
    assert island.revision == 0 and (outer == 0).all()
    counts = []

    def step(outer, mean, count):
        counts.append(count)
        return outer - mean

    outer = island.synchronise(outer, jnp.full(4, -2.0), step)
    assert island.revision == 1 and counts == [1] and (outer == 2).all()
    card = json.loads((tmp_path / "only.json").read_text())
    assert card["revision"] == 1 and card["author"] == "only" and card["time"] <= time.time()


def _card(folder, **changes):
    """Of an island that wrote just now and is not there any more."""
    card = Card(
        name="dead", address="127.0.0.1:9", life="0", revision=5, author="dead", offers={},
        failed=[], time=time.time(),
    )  # fmt: skip
    text = json.dumps(dataclasses.asdict(dataclasses.replace(card, **changes)))
    (folder / "dead.json").write_text(text)


def test_who_is_ahead_and_gives_nothing_is_not_waited_for(tmp_path):
    cfg = IslandConfig(folder=str(tmp_path), name="left", silent_s=0.6, pull_s=0.5, round_s=20.0)
    island = Island(cfg)
    _card(tmp_path)
    outer = island.join(jnp.zeros(2))
    assert island.revision == 0
    _card(tmp_path)
    outer = island.synchronise(outer, jnp.ones(2), lambda outer, mean, count: outer - mean)
    assert island.revision == 1 and (outer == -1).all()


def test_an_offer_that_failed_is_made_again(tmp_path):
    cfg = IslandConfig(folder=str(tmp_path), name="left")
    island = Island(cfg)
    island.join(jnp.zeros(2))

    def offered(failed):
        _card(tmp_path, revision=-1, failed=failed)
        island.announce()
        (uuid,) = json.loads((tmp_path / "left.json").read_text())["offers"].values()
        return uuid

    first = offered([])
    assert offered([]) == first and offered([first]) != first


@pytest.mark.parametrize(
    "change", [{"name": "a/b"}, {"silent_s": 0}, {"pull_s": -1}, {"pull_s": 10.0}]
)
def test_limits_that_make_no_sense_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        IslandConfig(**{"folder": "x", "name": "a"} | change)
