"""One of several processes whose schedules and native collectives must agree.

    python -m tests.collectives.processes_child FILE NAMES DATA EXPERT FLAGS

NAMES are those of builders. Process 0 writes them to FILE, with the numbers of arrays compared.
FLAGS are those of `experiments/train_steps/launch.py`.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags

from experiments.train_steps import launch
from moejax.collectives.builders import BUILDERS
from moejax.collectives.lower import run_schedule
from tests.collectives.cases import NATIVE, over, value_and_gradient, whole_numbers


def cases(names, axes):
    """Inputs by builder, and one program of all: ours and the native, values and gradients."""
    inputs, pairs = {}, {}
    for name in names:
        builder = BUILDERS[name]
        schedule, native = builder.build(axes), NATIVE[builder.operation]
        ours, sharding = over(lambda x, s=schedule: run_schedule(s, x)[0], axes)
        theirs, _ = over(lambda x, n=native: {k: n(v, tuple(axes)) for k, v in x.items()}, axes)
        rows = len(schedule.start[0]) * schedule.num_ranks
        inputs[name], pairs[name] = whole_numbers((rows, 3), sharding), (ours, theirs)
        if builder.operation == "parity":
            inputs[name] = {k: x for k, x in inputs[name].items() if "int" in k}

    def both(inputs):
        return {
            name: [value_and_gradient(fn, inputs[name]) for fn in pair]
            for name, pair in pairs.items()
        }

    return inputs, jax.jit(both)


def main(file, names, data, expert, *rest):
    flags.FLAGS([sys.argv[0], *rest])
    axes = {"data": int(data), "expert": int(expert)}
    launch.join(axes["data"] * axes["expert"])
    inputs, both = cases(names.split(","), axes)
    compared = {}
    for name, (got, want) in both(inputs).items():
        leaves = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
        for a, b in leaves:
            for mine, native in zip(a.addressable_shards, b.addressable_shards, strict=True):
                assert mine.index == native.index and mine.data.dtype == native.data.dtype
                np.testing.assert_array_equal(mine.data, native.data, err_msg=name)
        compared[name] = len(leaves)
    if jax.process_index() == 0:
        pathlib.Path(file).write_text(json.dumps(compared))


if __name__ == "__main__":
    main(*sys.argv[1:])
