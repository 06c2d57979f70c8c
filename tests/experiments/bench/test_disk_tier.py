"""The benchmark's arms must decode the same; cold files are out of the page cache."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments.bench import disk_tier
from moejax.experts.gated import init_experts
from tests.offload.on_disk import on_disk


@pytest.fixture
def parsed():
    flags.FLAGS(["disk_tier", "--rounds=3"])
    yield
    flags.FLAGS.unparse_flags()


def arm(milliseconds, tokens):
    one = types.SimpleNamespace(seconds=[], tokens=[], fetched=[])

    def step():
        one.seconds.append(1e-3 * milliseconds)
        one.tokens.append(np.array(tokens))
        one.fetched.append(4)

    one.step = step
    return one


def test_ratios_of_medians(parsed):
    result = disk_tier.compare({"host": arm(2, [1]), "cold": arm(5, [1])}, expert=10**6)
    assert result["over_host"] == {"host": 1.0, "cold": 2.5}
    assert result["fetched_mb_per_step"] == 4
    assert result["arms"]["cold"]["median_ms"] == pytest.approx(5)


def test_other_tokens_are_an_error(parsed):
    with pytest.raises(RuntimeError, match="cold decodes other tokens than host"):
        disk_tier.compare({"host": arm(2, [1]), "cold": arm(5, [2])}, expert=1)


def test_forgotten_rows_come_back_from_the_file(tmp_path):
    experts = init_experts(jax.random.key(0), (1, 4), 256, 256, out_scale=1.0, dtype=jnp.float32)
    disk = on_disk(tmp_path, experts)
    np.testing.assert_array_equal(disk.row(3).w_up, experts.w_up[0, 3])
    disk_tier.forget(disk)
    assert os.path.getsize(tmp_path / "experts-00000.safetensors") > 3 * 4 * 256 * 256 * 4
    np.testing.assert_array_equal(disk.row(3).w_up, experts.w_up[0, 3])
