"""One of several processes: dispatch over a mesh of all, or a training run that ends early.

    python -m tests.experiments.train_steps.process_child dispatch FILE DATA EXPERT NAMES FLAGS
    python -m tests.experiments.train_steps.process_child train FILE FLAGS

FLAGS are those of `experiments/train.py`. `dispatch` reads parameters, tokens and choices from FILE
and replaces them by what `tests.dispatch.cases` checks. `train` writes the parameters of step 2 to
FILE; at step 3, with that checkpoint complete, the last process kills itself.
"""

import dataclasses
import os
import pathlib
import pickle
import signal
import sys
import time

import jax
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.train_steps import launch
from moejax.dispatch.api import make_dispatch
from moejax.dispatch.slots import FITS_ALL
from moejax.experts.stage import reference
from tests.dispatch.cases import E, Layout, compiled, layout, specs

OPTIONS = {
    "gather": {},
    "all_to_all": {"capacity": FITS_ALL},
    "hierarchical": {"levels": ("data", "expert")},
    "ragged": {"capacity": FITS_ALL},
    "materialize": {"num_copies": E},
    "grouped": {"num_groups": 4, "gate": "balanced_groups"},
}


def run_dispatch(file: str, data: int, expert: int, names: list[str]) -> None:
    launch.join(data * expert)
    args = pickle.loads(pathlib.Path(file).read_bytes())
    results = {}
    for name in names:
        where = layout(data, expert, both=name == "hierarchical")
        # What is tested is the dispatch, and the reference compiles in a third of the time.
        options = OPTIONS[name] | dict(token_axes=where.token_axes, inner=reference)
        stage = make_dispatch(name, num_experts=E, **options)
        results[name] = fetch(compiled(stage, where)(*place(where, args)), where)
    write(file, results)


def place(where: Layout, args: tuple) -> tuple:
    """Global arrays of values that every process has."""
    tokens = P(where.token_axes)
    wanted = (specs(args[0], where), tokens, tokens)

    def put(spec, leaf):
        sharding = NamedSharding(where.mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, wanted, args, is_leaf=lambda leaf: isinstance(leaf, P))


def fetch(tree, where: Layout):
    """The whole arrays, in every process."""
    everywhere = NamedSharding(where.mesh, P())
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=everywhere)(tree))


def write(file: str, value) -> None:
    if jax.process_index() == 0:
        pathlib.Path(file).write_bytes(pickle.dumps(value))


def faulty(file: str, workdir: pathlib.Path, hooks):
    """The hooks of the program, and what this child is for."""

    def dispatched(step, state):
        hooks.dispatched(step, state)
        if step == 2:
            write(file, fetch(state.params, layout(2, 4)))
        if step == 3:
            while not (workdir / "checkpoints" / "2").exists():
                time.sleep(0.01)  # the save is asynchronous
            if jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    return dataclasses.replace(hooks, dispatched=dispatched)


def run_training(file: str) -> None:
    from experiments import cli, train
    from experiments.train_steps import run

    real = run.train

    def dying(*args, path, hooks, **rest):
        return real(*args, path=path, hooks=faulty(file, path.parent, hooks), **rest)

    run.train = dying
    cli.run(train.main)


if __name__ == "__main__":
    task, file, *rest = sys.argv[1:]
    if task == "train":
        sys.argv[1:] = rest
        run_training(file)
    else:
        data, expert, names, *given = rest
        flags.FLAGS([sys.argv[0], *given])
        run_dispatch(file, int(data), int(expert), names.split(","))
