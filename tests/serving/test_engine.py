"""Every way of serving the experts decodes the same tokens, batch 1 and batch many, prefill too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.memory import memory_kinds
from moejax.core.mesh import make_mesh
from moejax.costmodel.miss import MissCosts
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import forward, init_decoder
from moejax.offload.disk import DiskExperts
from moejax.offload.precision import in_two_precisions
from moejax.offload.stage import OffloadConfig
from moejax.offload.store import to_device, to_host
from moejax.predictors.history import init_history
from moejax.predictors.path import init_path
from moejax.predictors.pre_attention import init_pre_attention
from moejax.routing.config import RouterConfig
from moejax.serving import prediction
from moejax.serving.engine import make_engine, split_experts
from tests.offload.on_disk import on_disk

E, K, L = 8, 2, 3
CFG = moe_decoder(
    vocab_size=32,
    d_model=16,
    num_layers=L,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(d_ff=12, router=RouterConfig(num_experts=E, top_k=K), shared_d_ff=8),
)
LENGTHS = (6, 3, 1, 5)
COSTS = MissCosts(fetch_s=2.0, host_read_s=1.0, host_row_s=0.5)
DIVIDED = OffloadConfig(num_slots=6, serve="divide", costs=COSTS, prefetch_lanes=2)
NEW_TOKENS = 7


@functools.cache
def model():
    return init_decoder(jax.random.key(3), CFG)


@functools.cache
def prompts(batch):
    tokens = jax.random.randint(jax.random.key(4), (4, 6), 0, 32, dtype=jnp.int32)
    mask = jnp.arange(6)[None] < jnp.array(LENGTHS)[:, None]
    return tokens[:batch], mask[:batch]


def decode(
    batch, *, ranks=1, offload=None, make_prediction=None, new_tokens=NEW_TOKENS, folder=None
):
    """Tokens [n, B] and metrics summed over layers, [n] each, of one engine."""
    dense, experts = split_experts(model(), CFG)
    mesh = make_mesh(expert=ranks)
    if folder is not None:
        experts = on_disk(folder, experts)
    else:
        experts = (to_host if offload else to_device)(experts, mesh)
    pred = make_prediction(dense) if make_prediction else None
    engine = make_engine(dense, experts, CFG, mesh, capacity=16, offload=offload, prediction=pred)
    session = engine.start(batch)
    session, token, metrics = engine.prefill(session, *prompts(batch))
    tokens, all_metrics = [token], [metrics]
    for _ in range(new_tokens):
        session, token, metrics = engine.step(session)
        tokens.append(token)
        all_metrics.append(metrics)
    kinds = {"pinned_host" if offload else "device"} if folder is None else set()
    assert memory_kinds(engine.experts) == kinds
    summed = jax.tree.map(lambda *leaves: np.stack(leaves).sum(1), *all_metrics)
    return np.stack(tokens), summed


@functools.cache
def resident(batch):
    return decode(batch)[0]


def next_gate(dense):
    return prediction.next_gate(dense, CFG)


def history(dense):
    start = np.full((L, E), K / E, np.float32)
    learned = init_history(
        jax.random.key(5), jnp.asarray(start), vocab_size=32, embedding=8, hidden=8
    )
    return prediction.history(learned)


def path(dense):
    learned = init_path(
        jax.random.key(5), num_layers=L, num_experts=E, vocab_size=32, embedding=8, hidden=8
    )
    noise = 0.1 * jax.random.normal(jax.random.key(6), learned.w_out.shape)
    return prediction.fitted(dataclasses.replace(learned, w_out=noise), dense, CFG)


@pytest.mark.parametrize("batch", [1, 4])
def test_resident_engine_equals_greedy_full_forward(batch):
    """Each row of a batch of unequal prompts decodes what it decodes alone, recomputed in full."""
    tokens, mask = prompts(batch)
    ours = resident(batch)
    run = jax.jit(lambda t: forward(model(), t, CFG).logits)
    for row in range(batch):
        text = list(np.asarray(tokens[row])[: LENGTHS[row]])
        for step in range(NEW_TOKENS + 1):
            padded = jnp.asarray(text + [0] * (16 - len(text)), jnp.int32)[None]
            logits = run(padded)[0, len(text) - 1]
            # Random weights can tie closely; the engine's choice must be within rounding of best.
            assert logits[ours[step, row]] >= logits.max() - 1e-5
            text.append(int(ours[step, row]))


@pytest.mark.parametrize(
    "batch, ranks, offload, make_prediction",
    [
        (4, 1, OffloadConfig(num_slots=L), None),  # one slot a layer: waves
        (4, 1, OffloadConfig(num_slots=6, prefetch_lanes=2), next_gate),
        (1, 1, OffloadConfig(num_slots=6, prefetch_lanes=2, fetch_mode="always"), next_gate),
        (4, 1, OffloadConfig(num_slots=6, prefetch_lanes=3, policy="lfu"), history),
        (4, 2, OffloadConfig(num_slots=4, prefetch_lanes=2), next_gate),
        (1, 4, OffloadConfig(num_slots=3, prefetch_lanes=2), path),
        (4, 2, OffloadConfig(num_slots=4, serve="host"), None),
        (
            4,
            1,
            OffloadConfig(num_slots=6, serve="divide", costs=COSTS, prefetch_lanes=2),
            next_gate,
        ),
        (4, 2, None, None),
    ],
)
def test_same_tokens_and_conserved_counts(batch, ranks, offload, make_prediction):
    """Experts may be cached, prefetched or sharded over ranks: tokens do not change."""
    tokens, metrics = decode(batch, ranks=ranks, offload=offload, make_prediction=make_prediction)
    np.testing.assert_array_equal(tokens, resident(batch))
    missing = metrics.demand_fetches + metrics.host_computes
    np.testing.assert_array_equal(metrics.lookups, metrics.hits + missing)
    assert (metrics.prefetches_wasted <= metrics.prefetches).all()
    load = metrics.expert_load.sum(-1)
    assert load[0] == sum(LENGTHS[:batch]) * K * L and (load[1:] == batch * K * L).all()
    if make_prediction is None:
        assert metrics.prefetches.sum() == 0
    else:
        assert metrics.prefetches.sum() > 0
    if offload is None:
        assert metrics.demand_fetches.sum() == 0


def test_experts_on_disk_decode_the_same_tokens(tmp_path, monkeypatch):
    """Every row that is counted is read from a file, and what is read ahead is read of it."""
    read, announced = [], []
    row, will_need = DiskExperts.row, DiskExperts.will_need
    monkeypatch.setattr(DiskExperts, "row", lambda *args: (read.append(1), row(*args))[1])

    def note(disk, granules):
        announced.extend(np.asarray(granules).tolist())
        return will_need(disk, granules)

    monkeypatch.setattr(DiskExperts, "will_need", note)
    offload = OffloadConfig(num_slots=4, prefetch_lanes=1)
    tokens, metrics = decode(
        4, ranks=2, offload=offload, make_prediction=next_gate, folder=tmp_path
    )
    np.testing.assert_array_equal(tokens, resident(4))
    assert len(read) == metrics.demand_fetches.sum() + metrics.prefetches.sum()
    assert metrics.prefetches.sum() > 0
    named = set(announced) - {-1}
    assert len(named) > L * E / 2 and named <= set(range(L * E))


def test_preloaded_engine_never_misses():
    dense, experts = split_experts(model(), CFG)
    mesh = make_mesh(expert=2)
    engine = make_engine(
        dense,
        to_host(experts, mesh),
        CFG,
        mesh,
        capacity=16,
        offload=OffloadConfig(num_slots=L * E // 2),
    )
    session = engine.preload(
        engine.start(4), jnp.tile(jnp.arange(L * E // 2, dtype=jnp.int32), (2, 1))
    )
    session, token, metrics = engine.prefill(session, *prompts(4))
    assert int(metrics.demand_fetches.sum()) == 0
    np.testing.assert_array_equal(token, resident(4)[0])


def test_temperature_draws_from_the_key():
    dense, experts = split_experts(model(), CFG)
    engine = make_engine(dense, experts, CFG, make_mesh(), capacity=16)
    drawn = []
    for seed in (0, 0, 1):
        session, first, _ = engine.prefill(engine.start(4, seed=seed, temperature=1.5), *prompts(4))
        drawn.append(np.stack([first, *(engine.step(session)[1:2])]))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_wrong_use_is_refused(tmp_path):
    dense, experts = split_experts(model(), CFG)
    mesh = make_mesh()
    with pytest.raises(InputError, match="prefetch_lanes=0 and a prediction go together"):
        make_engine(
            dense,
            experts,
            CFG,
            mesh,
            capacity=8,
            offload=OffloadConfig(num_slots=6),
            prediction=next_gate(dense),
        )
    with pytest.raises(InputError, match="experts on disk want an offload"):
        make_engine(dense, on_disk(tmp_path, experts), CFG, mesh, capacity=4)
    with pytest.raises(InputError, match="experts in two precisions want an offload"):
        make_engine(dense, in_two_precisions(experts, "int8"), CFG, mesh, capacity=4)
    engine = make_engine(dense, experts, CFG, mesh, capacity=4)
    with pytest.raises(InputError, match="temperature=-1.0 must not be negative"):
        engine.start(1, temperature=-1.0)
    with pytest.raises(InputError, match="prompt of 6 positions after 0 exceeds the KV capacity 4"):
        engine.prefill(engine.start(1), *prompts(1))


def test_a_predictor_of_the_layer_itself_is_refused():
    d_model = CFG.d_model
    learned = init_pre_attention(
        jax.random.key(0), num_layers=L, d_model=d_model, hidden=2, num_experts=E
    )
    with pytest.raises(InputError, match="prefetching asks one layer ahead"):
        prediction.fitted(learned, model(), CFG)
