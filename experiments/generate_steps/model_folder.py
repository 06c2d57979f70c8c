"""Where a model is: a folder, or a repository of Hugging Face in the local cache or downloaded."""

import pathlib
import re

from moejax.core.errors import InputError

# No code, no pickles.
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def find_folder(name: str) -> pathlib.Path:
    """The folder of `--model`; a repository is downloaded where it is not in the cache."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(f"--model={name}: no such folder, and not like org/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"--model={name}: no such folder; name a folder, or pip install huggingface_hub to "
            "download the repository"
        ) from error
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # of the network, the hub, its cache
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--model={name}: no such folder, and not downloaded: {reason}") from error
