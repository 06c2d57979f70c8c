"""Bandwidths are those of copies that a cache does not answer."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure
from moejax.core.mesh import make_mesh
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.offload.store import to_host


def test_every_call_fetches_other_experts(monkeypatch):
    seen = []

    def spy(flat, granule):
        jax.debug.callback(lambda g: seen.append(int(g)), granule)
        return real(flat, granule)

    real = measure.fetch_rows
    monkeypatch.setattr(measure, "fetch_rows", spy)
    stack = jnp.ones((2, 8, 4, 4))
    store = to_host(GatedWeights(w_gate=stack, w_up=stack, w_down=stack), make_mesh())
    assert measure.host_fetch_bytes_per_s(store, experts=2, repeats=3) > 0
    jax.effects_barrier()
    assert len(seen) == 8 and len(np.unique(seen)) == 8


def test_large_experts_are_fetched_few_at_a_time(monkeypatch):
    stack = jnp.ones((1, 4, 4, 4))
    store = to_host(GatedWeights(w_gate=stack, w_up=stack, w_down=stack), make_mesh())
    shapes = []
    real = jnp.zeros
    monkeypatch.setattr(measure, "_MOST_BYTES", 2 * 3 * 4 * 4 * 4)  # two experts
    monkeypatch.setattr(measure.jnp, "zeros", lambda s, d: shapes.append(s) or real(s, d))
    assert measure.host_fetch_bytes_per_s(store, repeats=1) > 0
    assert shapes == [(2, 4, 4)] * 3
