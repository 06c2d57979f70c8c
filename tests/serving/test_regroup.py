"""Regrouped sequences decode the tokens that they would have decoded where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import init_decoder
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_device, to_host
from moejax.predictors.history import init_history
from moejax.routing.config import RouterConfig
from moejax.serving import prediction
from moejax.serving.engine import make_engine, split_experts
from moejax.serving.regroup import regroup

E, K, L, B, V = 8, 2, 2, 2, 32
CFG = moe_decoder(
    vocab_size=V,
    d_model=16,
    num_layers=L,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(d_ff=12, router=RouterConfig(num_experts=E, top_k=K)),
)
LENGTHS = ((6, 3), (1, 5))
ORDER = np.array([3, 0, 2, 1])


def make(memory, **options):
    dense, experts = split_experts(init_decoder(jax.random.key(3), CFG), CFG)
    mesh = make_mesh(expert=1)
    return make_engine(dense, memory(experts, mesh), CFG, mesh, capacity=16, **options)


@pytest.fixture(scope="module")
def engine():
    return make(to_device)


def started(engine):
    """Two sessions after their prompts and two tokens, and the newest tokens [2 B]."""
    tokens = jax.random.randint(jax.random.key(4), (2, B, 6), 0, V, dtype=jnp.int32)
    sessions = []
    for prompt, lengths in zip(tokens, LENGTHS, strict=True):
        mask = jnp.arange(6)[None] < jnp.array(lengths)[:, None]
        session, _, _ = engine.prefill(engine.start(B), prompt, mask)
        for _ in range(2):
            session, _, _ = engine.step(session)
        sessions.append(session)
    return sessions


def decode(engine, sessions, steps=4):
    """Tokens [steps, 2 B] of both sessions, and the sessions."""
    rows = []
    for _ in range(steps):
        stepped = [engine.step(session) for session in sessions]
        sessions = [session for session, _, _ in stepped]
        rows.append(np.concatenate([token for _, token, _ in stepped]))
    return np.stack(rows), sessions


def test_tokens_follow_their_sequences(engine):
    want, _ = decode(engine, started(engine))
    dealt = regroup(engine, *started(engine), ORDER)
    got, dealt = decode(engine, dealt, 2)
    np.testing.assert_array_equal(got, want[:2, ORDER])
    back, _ = decode(engine, regroup(engine, *dealt, np.argsort(ORDER)), 2)
    np.testing.assert_array_equal(back, want[2:])
    assert len(set(map(tuple, want.T))) == 2 * B  # no two sequences say the same


def test_the_predictor_goes_with_its_sequences_and_the_slots_stay():
    share = jnp.full((L, E), K / E)
    learned = init_history(jax.random.key(5), share, vocab_size=V, embedding=8, hidden=8)
    ahead = prediction.history(learned)
    offload = OffloadConfig(num_slots=4, prefetch_lanes=2)
    engine, rng = make(to_host, offload=offload, prediction=ahead), np.random.default_rng(0)

    def random(leaf):
        return jnp.asarray(rng.integers(0, 99, leaf.shape), leaf.dtype)

    before = []
    for _ in range(2):
        session = engine.start(B)
        before.append(session.replace(offload=jax.tree.map(random, session.offload)))
    after = regroup(engine, *before, ORDER)
    for name, axis in {"ema": 2, "latent": 1, "token": 1}.items():  # after the axes of R and L
        both = [np.asarray(getattr(side.offload.predictor, name)) for side in before]
        for side, rows in zip(after, ORDER.reshape(2, B), strict=True):
            want = np.take(np.concatenate(both, axis), rows, axis)
            np.testing.assert_array_equal(getattr(side.offload.predictor, name), want)
    for old, new in zip(before, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, new.offload.cache, old.offload.cache)


def test_what_is_no_permutation_is_refused(engine):
    sessions = engine.start(B), engine.start(B)
    with pytest.raises(InputError, match="not a permutation of 4"):
        regroup(engine, *sessions, np.array([0, 1, 2, 2]))
    with pytest.raises(InputError, match="sessions of 2 and 3"):
        regroup(engine, sessions[0], engine.start(3), np.arange(4))
