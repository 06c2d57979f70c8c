"""One island of several: a small regression whose optimum differs from island to island.

    python -m tests.elastic.island_child FOLDER NAME TARGET ROUNDS DIES

Writes `NAME.out` beside the folder: JSON of the checksum of the weights at every revision, and the
last weights. With DIES >= 0 it kills itself in the middle of the round after that revision.
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


def main(folder, name, target, rounds, dies):
    jax.config.update("jax_num_cpu_devices", 1)
    limits = dict(silent_s=4.0, pull_s=4.0, round_s=60.0)
    island = Island(IslandConfig(folder=folder, name=name, **limits))
    outer = island.join(jnp.zeros(DIM))
    seen = {}

    def outer_step(outer, mean, count):
        return outer - 0.7 * mean

    while island.revision < int(rounds):
        if island.revision == int(dies):
            os.kill(os.getpid(), signal.SIGKILL)
        weights = outer
        for _ in range(5):
            weights = weights - 0.2 * (weights - float(target))
        outer = island.synchronise(outer, outer - weights, outer_step)
        seen[island.revision] = zlib.crc32(np.asarray(outer).tobytes())
        time.sleep(0.2)
    result = {"seen": seen, "weights": float(outer[0]), "same": bool((outer == outer[0]).all())}
    pathlib.Path(folder).with_name(f"{name}.out").write_text(json.dumps(result))
    while any(card.revision < int(rounds) for card in island.others()):
        island.announce()
        time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
