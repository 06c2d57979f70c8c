"""Group sizes and comparisons that all grouped kernels are tested on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

NUM_GROUPS = 8
# Ragged on purpose: below, at and above the chunk sizes of the tests.
FULL_SIZES = np.asarray([1, 5, 3, 9, 2, 4, 7, 1], np.int32)
NUM_ROWS = int(FULL_SIZES.sum()) + 3  # three rows that belong to no group
SIZES = (2, 4)

SKEWED = {
    "one_group_has_all": (0, 0, 35, 0, 0, 0, 0, 0),
    "first_is_large": (28, 1, 1, 1, 1, 1, 1, 1),
    "last_is_large": (1, 0, 1, 0, 1, 0, 1, 31),
    "multiples_of_the_chunk": (4, 8, 4, 0, 4, 4, 8, 0),
    "no_rows": (0,) * 8,
    "few_rows": (0, 1, 0, 0, 1, 0, 0, 0),
}


def empty_patterns() -> np.ndarray:
    """int32 [256, 8]: every pattern of empty groups."""
    return np.asarray(list(itertools.product((0, 1), repeat=NUM_GROUPS)), np.int32) * FULL_SIZES


def assert_close(got, want, tolerance=1e-5):
    """max|got - want| <= tolerance * max|want| on every leaf, and no leaf is trivially zero."""

    def compare(path, a, b):
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (
            jax.tree_util.keystr(path),
            np.abs(a - b).max(),
            np.abs(b).max(),
        )

    jax.tree_util.tree_map_with_path(compare, got, want)


def value_and_grads(fn):
    """jit of `(diff_args, group_sizes, cotangent) -> (value, gradients)`, traced group sizes."""

    def run(args, group_sizes, ct):
        y, vjp = jax.vjp(lambda *args: fn(*args, group_sizes), *args)
        return y, vjp(ct.astype(y.dtype))

    return jax.jit(run)


def normal(key, *shapes, dtype=jnp.float32):
    """One standard normal array per shape."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]
