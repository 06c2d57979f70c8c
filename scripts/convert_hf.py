"""Converts a model: a Hugging Face folder to checkpoints of moejax, or back.

    python -m scripts.convert_hf --src=folder/of/safetensors --dst=folder/for/checkpoints
    python -m scripts.convert_hf --src=folder/of/checkpoints --dst=folder/for/safetensors

Which way is seen from `--src`. Checkpoints hold experts in logical order and restore on any mesh;
they keep the config.json, so that the way back gives a folder that `transformers` loads. A
conversion that was stopped goes on when it is started again. Tokenizer files go along.
"""

import pathlib
import resource
import shutil
import sys

from absl import flags
from rich.progress import Progress

from experiments import cli
from moejax.core.errors import InputError, check
from moejax.core.mesh import make_mesh
from moejax.interop.convert import write_checkpoint, write_folder
from moejax.interop.load import read_model

SRC = flags.DEFINE_string("src", None, "folder to read: safetensors, or checkpoints of moejax")
DST = flags.DEFINE_string("dst", None, "folder to write")
DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; default: that of --src")

ALONG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def main() -> None:
    if not SRC.value or not DST.value:
        raise InputError("--src and --dst name the folders to read and to write")
    source, target = pathlib.Path(SRC.value), pathlib.Path(DST.value)
    check(source.resolve() != target.resolve(), f"--src and --dst are the same folder {source}")
    cli.check_writable(cli.JSON.value)
    cli.check_writable(str(target / "file"))
    with Progress() as progress:
        task = progress.add_task("read", total=None)
        model = read_model(
            source,
            mesh=make_mesh(),
            dtype=DTYPE.value,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        progress.add_task("write", total=None)
        from_hf = (source / "config.json").exists()
        written = write_checkpoint(model, target) if from_hf else write_folder(model, target)
    for name in ALONG:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    figures = {
        "direction": "to checkpoints" if from_hf else "to safetensors",
        "tensors_read": model.tensors_read,
        "tensors_unused": len(model.unused),
        "tensors_written": written,
        "peak_host_bytes": peak_host_bytes(),
        "target_bytes": model.nbytes,
    }
    cli.write_report("convert_hf", "numerics", figures)
    print(f"{target}: {written} tensors, {model.nbytes / 2**20:.1f} MiB")
    if model.unused:
        print(f"{len(model.unused)} tensors are no part of the decoder: {model.unused[0]} ...")


def peak_host_bytes() -> int:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    cli.run(main)
