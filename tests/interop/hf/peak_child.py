"""Loads a large model and prints what host memory that took, as JSON.

    python -m tests.interop.hf.peak_child FOLDER SMALL_FOLDER [EXPERTS_DTYPE [EXPERTS_FOLDER]]

With a folder for experts they are written there; `any` is what is stored. A small model is loaded
first: what Python and jax take once is not the loader's.
"""

import json
import pathlib
import resource
import sys

from moejax.core.memory import nbytes
from moejax.core.mesh import make_mesh
from moejax.interop.hf.load import load_folder, open_model
from moejax.interop.on_disk import load_on_disk


def held():
    """Bytes of memory that this process holds now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak():
    """The most that it has held; `getrusage` would count what its parent held."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    large, small, experts_dtype, folder = [*sys.argv[1:], None, None][:4]
    experts_dtype = None if experts_dtype == "any" else experts_dtype
    load_folder(small, mesh=make_mesh(), experts_dtype=experts_dtype)
    before = held()
    if folder is None:
        target = load_folder(large, mesh=make_mesh(), experts_dtype=experts_dtype).nbytes
    else:
        how = dict(mesh=make_mesh(), experts_dtype=experts_dtype)
        target = nbytes(load_on_disk(open_model(large), pathlib.Path(folder), **how)[0])
    print(json.dumps({"peak": peak() - before, "target": target}))
