"""One island of several: a small regression whose optimum differs from island to island.

    python -m tests.elastic.island_child FOLDER NAME TARGET ROUNDS DIES FIRST

Joins when all FIRST islands, names such as `abc`, have come, and waits halfway for `d`, so that all
meet however long processes take to start. With DIES >= 0 it kills itself in the middle of the round
after that revision. Writes `NAME.out` beside the folder: JSON of the checksum of the weights at
every revision, and the last weights.
"""

import json
import os
import pathlib
import signal
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from moejax.elastic.islands import Island, IslandConfig

DIM = 64


def wait_for(island, names, revision):
    """Until all these are there, at this revision or a later one."""
    there = set()
    while not there >= set(names) - {island.cfg.name}:
        time.sleep(0.1)
        island.announce()
        there |= {card.name for card in island.others() if card.revision >= revision}


@jax.jit
def inner_steps(weights, target):
    for _ in range(5):
        weights = weights - 0.2 * (weights - target)
    return weights


def main(folder, name, target, rounds, dies, first):
    jax.config.update("jax_num_cpu_devices", 1)
    limits = dict(silent_s=6.0, pull_s=3.0, round_s=60.0)
    island = Island(IslandConfig(folder=folder, name=name, **limits))
    inner_steps(jnp.zeros(DIM), float(target))  # compiled before anybody waits
    wait_for(island, first, -1)
    outer = island.join(jnp.zeros(DIM))
    seen = {}

    def outer_step(outer, mean, count):
        return outer - 0.7 * mean

    while island.revision < int(rounds):
        if 0 <= int(dies) <= island.revision:
            os.kill(os.getpid(), signal.SIGKILL)
        if island.revision >= int(rounds) // 2:
            wait_for(island, "d", 0)
        weights = inner_steps(outer, float(target))
        outer = island.synchronise(outer, outer - weights, outer_step)
        seen[island.revision] = zlib.crc32(np.asarray(outer).tobytes())
        time.sleep(0.05)
    result = {"seen": seen, "weights": float(outer[0]), "same": bool((outer == outer[0]).all())}
    pathlib.Path(folder).with_name(f"{name}.out").write_text(json.dumps(result))
    while any(card.revision < int(rounds) for card in island.others()):
        island.announce()
        time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
