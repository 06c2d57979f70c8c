"""Eight CPU devices and strict numerics for every test."""

import os

# Eight host devices on two cores can deadlock in collectives unless the thread pool is larger.
os.environ.setdefault("NPROC", "16")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402

from moejax.core.compat import cheap_cpu_options  # noqa: E402

# Tests compile much and run little.
CHEAP = cheap_cpu_options(0) | {"xla_cpu_parallel_codegen_split_count": 1}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in CHEAP.items()))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_legacy_prng_key", "error")
# Threefry takes seconds to compile on CPU, and tests draw many small arrays.
jax.config.update("jax_default_prng_impl", "rbg")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run tests marked `full`")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    full = [item for item in items if "full" in item.keywords]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if "full" not in item.keywords]


@pytest.fixture
def key():
    return jax.random.key(0)
