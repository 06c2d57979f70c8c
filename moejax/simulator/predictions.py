"""What a real predictor said, in the place of predictions that are drawn by recall.

Scores become votes by the very function by which the compiled step chooses what to prefetch, and a
workload takes them as they are. How far down its list a predictor can be trusted is measured on
past steps, behind the cache: an easy guess is often resident and moves nothing.

Axis letters:
    L  MoE layers      E  experts      N  steps      B  tokens of a step      m  guesses of a layer
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import check
from moejax.offload.prefetch import demand
from moejax.simulator.link import wanted_order
from moejax.simulator.plans import Plan
from moejax.simulator.slots import fill_slots, insert, touch
from moejax.simulator.workload import Workload


def votes_of_scores(scores: np.ndarray, top_k: int, *, horizon: int = 1) -> np.ndarray:
    """float64 [N, L, E] of scores [L - h, N, B, E] for target layers h .. L - 1.

    The tokens that an expert is predicted to serve and, as a fraction, how likely; below one vote
    0, for those are not fetched. The first h = `horizon` layers are predicted by nobody.
    """
    targets, steps, _, num_experts = scores.shape
    votes = np.zeros((steps, targets + horizon, num_experts))
    for target, one in enumerate(scores, start=horizon):
        votes[:, target] = _votes(jnp.asarray(one, jnp.float32), top_k)
    return np.where(votes >= 1, votes, 0.0)


@partial(jax.jit, static_argnames="top_k")
def _votes(scores: jax.Array, top_k: int) -> jax.Array:
    """float32 [N, E] of one layer's scores [N, B, E]."""
    every = jnp.ones(scores.shape[1], bool)
    return jax.vmap(partial(demand, valid=every, top_k=top_k))(scores)


def with_votes(work: Workload, votes: np.ndarray, precision: np.ndarray) -> Workload:
    """`work` with the predictions `votes` [N, L, E] of its steps, right as often as `precision`.

    `InputError` for votes of other steps.
    """
    check(
        votes.shape == work.tokens.shape,
        f"votes are {votes.shape}, the steps want {work.tokens.shape}",
    )
    return dataclasses.replace(work, predicted=votes, precision=precision)


def precision_by_rank(work: Workload, plan: Plan, *, slots: int) -> np.ndarray:
    """How often the r-th best guess among experts that are not cached is wanted, float64 [m].

    The steps of `work` are followed through the cache of `plan`, which fetches what it lacks and
    nothing ahead. m is the most guesses that any layer had; a rank is judged where it was reached.
    """
    steps, layers, num_experts = work.tokens.shape
    cache = fill_slots(work, plan, slots)
    asked, right = np.zeros(num_experts), np.zeros(num_experts)
    for step in range(steps):
        for layer in range(layers):
            tokens, votes = work.tokens[step, layer], work.predicted[step, layer]
            wanted, resident = tokens > 0, cache.resident[layer]
            guesses = wanted_order(votes, cache.scores[layer], ~resident & (votes > 0))
            asked[: len(guesses)] += 1
            right[: len(guesses)] += wanted[guesses]
            missing = np.flatnonzero(wanted & ~resident)
            touch(cache, layer, tokens)
            insert(cache, layer, missing, wanted)
    reached = asked[asked > 0]
    return right[: len(reached)] / reached
