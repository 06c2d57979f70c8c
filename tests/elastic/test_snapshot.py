"""Any one of five hosts is lost and comes back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.elastic.snapshot import make_parity, pack, packing_of, rebuild, unpack

R = 5
AXES = {"data": R}


def _state(host):
    rng = np.random.default_rng(host)
    factor = np.float32(np.nan if host == 2 else 1)
    return {
        "w": rng.standard_normal((3, 7)).astype(np.float32) * factor,
        "half": jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
        "step": np.int32(host),
        "mask": rng.random(3) > 0.5,
    }


@pytest.fixture(scope="module")
def run():
    """(pieces, parity) of all hosts, and what is rebuilt for each lost one, in one program."""
    mesh, spec = make_mesh(data=R), P("data")
    pieces = np.stack([pack(jax.device_get(_state(host)), R) for host in range(R)])

    def body(pieces):
        parity = make_parity(pieces[0], AXES)
        lost = []
        for host in range(R):
            gone = jax.lax.axis_index("data") == host
            own, check = (jnp.where(gone, jnp.uint32(7), x) for x in (pieces[0], parity))
            lost.append(rebuild(own, check, AXES, host))
        return parity, jax.tree.map(lambda x: x[None], lost)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    parity, lost = jax.jit(mapped)(pieces)
    return pieces, np.asarray(parity), jax.device_get(lost)


def test_any_lost_host_is_rebuilt_bit_for_bit(run):
    pieces, parity, rebuilt = run
    assert parity.shape == (R, pieces.shape[2])  # 1 / (R - 1) of what it protects
    for host, (got, check) in enumerate(rebuilt):
        for rank in range(R):
            np.testing.assert_array_equal(got[rank], pieces[host])
            np.testing.assert_array_equal(check[rank, 0], parity[host])
        state = unpack(got[0], packing_of(_state(host)))
        for a, b in zip(*map(jax.tree.leaves, (state, _state(host))), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.tobytes() == np.asarray(b).tobytes()


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="parity wants at least 2 hosts, got 1"):
        pack({"a": np.ones(3)}, 1)
    with pytest.raises(InputError, match="8 bytes of pieces, the tree has 12"):
        unpack(np.zeros((1, 2), np.uint32), packing_of({"a": np.ones(3, np.float32)}))
    with pytest.raises(InputError, match=r"lost=2 is not in 0..1"):
        mapped = jax.shard_map(
            lambda x: rebuild(x, x, {"data": 2}, 2), mesh=make_mesh(data=2),
            in_specs=P(), out_specs=P(),
        )  # fmt: skip
        jax.eval_shape(mapped, jnp.zeros((1, 4), jnp.uint32))
