"""A config from a Python file: `--config=configs/byte_moe.py`."""

import importlib.util
import pathlib

from configs.run import RunConfig
from moejax.core.errors import InputError, check


def load_config(path: str) -> RunConfig:
    """What `get_config()` of the file returns; raises `InputError` unless that is a `RunConfig`."""
    file = pathlib.Path(path)
    check(file.is_file() and file.suffix == ".py", f"--config={path} is not a Python file")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise InputError(f"--config={path}: {type(error).__name__}: {error}") from error
    kind = type(config).__name__
    check(isinstance(config, RunConfig), f"--config={path}: get_config() is a {kind}, no RunConfig")
    return config
