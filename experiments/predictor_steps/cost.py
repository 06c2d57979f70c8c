"""What the history predictor costs in a decode step of one sequence, for one horizon."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measure import best_seconds
from moejax.predictors import history
from moejax.predictors.history import HistoryParams


def cost_of(params: HistoryParams, top_k: int, tokens: int = 200) -> dict[str, float]:
    """Bytes, multiply-adds, and microseconds of this machine, of parameters of any value."""
    layers, experts, width = params.net.choice.shape
    hidden, decays = params.net.reader.w_in.shape[1], len(params.net.past)
    each = 2 * width * hidden + width * experts + decays * experts
    opening = decays * (layers * experts + width) * width

    @jax.jit
    def decode(params, state, chosen):
        def layer_body(state, step):
            state = history.follow(params, state, *step)
            return state, history.ask(params, state, step[0])

        def token_body(state, chosen):
            return jax.lax.scan(layer_body, state, (jnp.arange(layers), chosen))

        return jax.lax.scan(token_body, state, chosen)[1].sum()

    chosen = np.random.default_rng(0).integers(0, experts, (tokens, layers, 1, top_k))
    arguments = params, history.init_state(params, 1), jnp.asarray(chosen, jnp.int32)
    secs = best_seconds(lambda: decode(*arguments), 5)
    return {
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "multiply_adds_per_layer": each,
        "multiply_adds_per_token": layers * each + opening,
        "us_per_layer": 1e6 * secs / (tokens * layers),
    }
