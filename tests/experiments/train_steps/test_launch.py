"""Joining several processes: dispatch over all of them, and flags that do not go together."""

import pickle

import jax
import pytest
from absl.testing import flagsaver

from experiments.train_steps import launch
from moejax.core.errors import InputError
from tests.dispatch.cases import check_exact, inputs, routings
from tests.experiments.train_steps.runs import finish, start


@pytest.mark.parametrize(
    "count, data, expert, names",
    [(2, 2, 4, "gather,all_to_all,hierarchical"), (4, 2, 2, "gather")],
    ids=["two processes", "four processes"],
)
def test_dispatch_over_processes_equals_the_reference(tmp_path, count, data, expert, names):
    file, idx = tmp_path / "arrays", routings()["uniform"]
    file.write_bytes(pickle.dumps((*jax.device_get(inputs()), idx)))
    task = ["dispatch", str(file), str(data), str(expert), names]
    for status, output in finish(start(count, task, ["--heartbeat_secs=60"])):
        assert status == 0, output[-3000:]
    results = pickle.loads(file.read_bytes())
    assert ",".join(results) == names
    for got in results.values():
        check_exact(lambda *args, got=got: got, idx)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(num_processes=2), "--num_processes=2 wants --coordinator=host:port, got None"),
        (dict(coordinator="auto", process_id=0), "--process_id=0 wants .* got auto"),
        (dict(coordinator="a"), "--coordinator=a is neither auto nor host:port"),
        (dict(coordinator="a:1", num_processes=2), "wants --num_processes and --process_id"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id=2 is not below"),
        (
            dict(coordinator="a:1", num_processes=3, process_id=2),
            "a mesh of 8 devices is not divisible by --num_processes=3",
        ),
    ],
)
def test_refuses_flags_that_do_not_go_together(given, message):
    with flagsaver.as_parsed(**{name: str(value) for name, value in given.items()}):
        with pytest.raises(InputError, match=message):
            launch.check_flags(8)
