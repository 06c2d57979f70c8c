"""Loads a large model and prints what host memory that took, as JSON.

    python -m tests.interop.hf.peak_child FOLDER SMALL_FOLDER [EXPERTS_DTYPE]

A small model is loaded first: what Python and jax take once is not the loader's.
"""

import json
import pathlib
import resource
import sys

from moejax.core.mesh import make_mesh
from moejax.interop.hf.load import load_folder


def held():
    """Bytes of memory that this process holds now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    large, small, experts_dtype = [*sys.argv[1:], None][:3]
    load_folder(small, mesh=make_mesh(), experts_dtype=experts_dtype)
    before = held()
    model = load_folder(large, mesh=make_mesh(), experts_dtype=experts_dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak - before, "target": model.nbytes}))
