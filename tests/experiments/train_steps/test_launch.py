"""Several processes that join: dispatch over all of them equals the reference."""

import pickle

import jax
import pytest

from tests.dispatch.cases import balanced_routing, check_exact, inputs, routings
from tests.experiments.train_steps.runs import CHILD, finish, start

REST = "ragged,materialize,grouped"


@pytest.mark.parametrize(
    "count, data, expert, names",
    [
        pytest.param(2, 2, 4, "gather,all_to_all,hierarchical", id="two processes"),
        pytest.param(4, 2, 2, "gather", id="four processes"),
        pytest.param(2, 2, 4, REST, id="two processes, rest", marks=pytest.mark.full),
    ],
)
def test_dispatch_over_processes_equals_the_reference(tmp_path, count, data, expert, names):
    file, idx = tmp_path / "arrays", balanced_routing(4) if names == REST else routings()["uniform"]
    file.write_bytes(pickle.dumps((*jax.device_get(inputs()), idx)))
    task = ["dispatch", str(file), str(data), str(expert), names]
    for status, output in finish(start(count, CHILD, [*task, "--heartbeat_secs=60"])):
        assert status == 0, output[-3000:]
    results = pickle.loads(file.read_bytes())
    assert ",".join(results) == names
    for got in results.values():
        check_exact(lambda *args, got=got: got, idx)
