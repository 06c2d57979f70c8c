"""Several models by one slot table: their MLPs are experts, and a sequence names its model.

What SN40L (arXiv 2405.07518) switches between are whole models; here those that share all but
their MLPs, as adapters and fine-tuned copies may.

Axis letters:
    L  layers    M  models    B  sequences    S  positions
"""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.mesh import make_mesh
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import forward, init_decoder
from moejax.models.experts import join_experts, split_experts
from moejax.offload.stage import OffloadConfig, init_state, offloaded
from moejax.offload.store import to_host
from moejax.routing.config import RouterConfig
from tests.exact import exact_jit

L, M, B, S = 2, 4, 3, 3


def decoder(models: int):
    # One expert per token, and of weight one: the router has no say.
    router = RouterConfig(num_experts=models, top_k=1)
    return moe_decoder(
        vocab_size=32, d_model=16, num_layers=L, num_heads=2, num_kv_heads=1, head_dim=8,
        moe=MoEConfig(d_ff=8, router=router),
    )  # fmt: skip


def test_sequences_of_different_models_share_a_batch_and_a_cache():
    cfg, alone = decoder(M), decoder(1)
    params, mlps = split_experts(init_decoder(jax.random.key(0), cfg), cfg)
    single, _ = split_experts(init_decoder(jax.random.key(0), alone), alone)
    tokens = jax.random.randint(jax.random.key(1), (B, S), 0, 32, jnp.int32)
    offload = OffloadConfig(num_slots=2 * L)

    def choose(model_of):
        """int32 [L, B * S, 1]: the model of every sequence, at every layer and position."""
        return jnp.broadcast_to(jnp.repeat(model_of, S)[None, :, None], (L, B * S, 1))

    @exact_jit
    def serve(store, state, model_of):
        out = forward(
            params, tokens, cfg, forced_idx=choose(model_of),
            stage=offloaded(store, offload), stage_state=state,
        )  # fmt: skip
        return out.logits, out.stage_state, out.metrics

    # The same weights beside the MLPs; of the router, one column is left.
    shared = jax.tree.map(
        lambda of_many, of_one: of_many if of_many.shape == of_one.shape else of_one, params, single
    )
    run_alone = exact_jit(lambda params: forward(params, tokens, alone).logits)
    store = to_host(mlps, make_mesh())
    state, moved = init_state(store, offload), []
    for named in ([0, 3, 0], [3, 0, 3], [1, 1, 2]):
        logits, state, metrics = serve(store, state, jnp.array(named, jnp.int32))
        moved.append(int(metrics.demand_fetches.sum()))
        for row, model in enumerate(named):
            own = jax.tree.map(lambda leaf, m=model: leaf[:, m : m + 1], mlps)
            want = run_alone(join_experts(shared, own, alone))[row]
            np.testing.assert_array_equal(logits[row], want)
    assert moved == [2 * L, 0, 2 * L]  # a model's MLPs stay until others want the slots
