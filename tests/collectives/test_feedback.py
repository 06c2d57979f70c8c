"""What is left out comes later; sums of sparse codes; overlap counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.collectives.builders import doubling_all_gather, ring_all_reduce
from moejax.collectives.codecs import BlockQuant, TopK, TwoBit
from moejax.collectives.feedback import OverlapWeight, error_feedback, gathered_sum, project
from moejax.core.errors import InputError
from tests.collectives.cases import over


@pytest.mark.parametrize("codec", [TopK(3, 16), TwoBit(0.05), BlockQuant(4, 4)])
def test_everything_arrives_in_the_end(codec):
    """What was sent and what is still owed are what was wanted, in every step."""
    transform = error_feedback(codec)
    rng = np.random.default_rng(0)
    grads = {"a": jnp.asarray(rng.normal(0, 0.1, (2, 10)), jnp.float32), "b": jnp.ones(4) / 50}
    state, total = transform.init(grads), jax.tree.map(jnp.zeros_like, grads)
    update = jax.jit(transform.update)
    for step in range(1, 21):
        sent, state = update(grads, state)
        total = jax.tree.map(jnp.add, total, sent)
        for name, grad in grads.items():
            wanted = step * np.asarray(grad)
            np.testing.assert_allclose(total[name] + state.residual[name], wanted, atol=1e-5)
            np.testing.assert_array_equal(project(codec, sent[name]), sent[name])
    # Without feedback the small ones would never go.
    assert (np.asarray(project(codec, grads["b"])) == 0).any() == isinstance(codec, TopK | TwoBit)
    assert (np.asarray(total["b"]) > 0).all()


def test_sparse_sums_agree_and_weigh_by_overlap():
    gather = doubling_all_gather({"data": 2, "expert": 4})
    codec, rng = TopK(5, 64), np.random.default_rng(0)
    x = rng.standard_normal((8, 40)).astype(np.float32)

    def run(x):
        plain = gathered_sum(x, codec, gather)
        return plain, gathered_sum(x, codec, gather, OverlapWeight(few=2, gain=1.5))

    run, sharding = over(run, {"data": 2, "expert": 4})
    plain, weighted = (np.asarray(y) for y in run(jax.device_put(x, sharding)))
    kept = np.stack([np.asarray(project(codec, jnp.asarray(row))) for row in x])
    want = np.zeros(40, np.float32)
    for row in kept:
        want += row
    overlap = (kept != 0).sum(0)
    assert {1, 2} < set(overlap.tolist())
    for rank in range(8):
        np.testing.assert_array_equal(plain[rank], plain[0])
        np.testing.assert_allclose(plain[rank], want, rtol=1e-6)
        np.testing.assert_allclose(weighted[rank], np.where(overlap <= 2, 1.5, 1) * want, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="an array of 7 elements has no 2 equal rows"):
        project(TwoBit(1.0), jnp.ones(7), rows=2)
    with pytest.raises(InputError, match="gather wants a chunk per rank"):
        gathered_sum(jnp.ones(7), TwoBit(1.0), ring_all_reduce({"expert": 4}))
