"""Version shims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import compat


def test_version_is_that_of_jax():
    assert ".".join(map(str, compat.JAX_VERSION)) == ".".join(jax.__version__.split(".")[:3])


@pytest.mark.parametrize(
    ("platform", "version", "sound"),
    [
        ("cuda", (0, 10, 2), False),
        ("gpu", (0, 11, 0), False),
        ("cuda", (0, 11, 1), True),
        ("gpu", (0, 12, 0), True),
        ("tpu", (0, 10, 2), True),
        ("cpu", (0, 10, 2), True),
    ],
)
def test_host_slices_are_unsound_on_old_cuda_alone(monkeypatch, platform, version, sound):
    monkeypatch.setattr(compat, "JAX_VERSION", version)
    assert compat.host_slices_are_sound(platform) is sound


def test_compute_on_marks_the_function_for_the_host():
    def double(x):
        return 2 * x

    on_host = compat.compute_on(double, compute_type="device_host", out_memory_spaces=compat.DEVICE)
    step = jax.jit(lambda x: on_host(x) + 1)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(step(x), [1.0, 3.0, 5.0])
    assert '_xla_compute_type = "host"' in step.lower(x).as_text()


def test_this_jax_knows_the_options_of_a_cheap_compile():
    add = jax.jit(lambda x: x + 1, compiler_options=compat.cheap_cpu_options(0))
    np.testing.assert_array_equal(add(jnp.arange(3.0)), [1.0, 2.0, 3.0])
