"""Several processes that join: dispatch over all of them equals the reference."""

import pickle

import jax
import pytest

from tests.dispatch.cases import check_exact, inputs, routings
from tests.experiments.train_steps.runs import CHILD, finish, start


@pytest.mark.parametrize(
    "count, data, expert, names",
    [(2, 2, 4, "gather,all_to_all,hierarchical"), (4, 2, 2, "gather")],
    ids=["two processes", "four processes"],
)
def test_dispatch_over_processes_equals_the_reference(tmp_path, count, data, expert, names):
    file, idx = tmp_path / "arrays", routings()["uniform"]
    file.write_bytes(pickle.dumps((*jax.device_get(inputs()), idx)))
    task = ["dispatch", str(file), str(data), str(expert), names]
    for status, output in finish(start(count, CHILD, [*task, "--heartbeat_secs=60"])):
        assert status == 0, output[-3000:]
    results = pickle.loads(file.read_bytes())
    assert ",".join(results) == names
    for got in results.values():
        check_exact(lambda *args, got=got: got, idx)
