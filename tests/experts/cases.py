"""Experts and routings that the tests of expert stages share."""

import jax.numpy as jnp
import numpy as np

from moejax.core.structs import Routing
from moejax.kernels.grouped_ffn import GatedWeights

T, D, F, E, K = 10, 8, 6, 8, 2
SMALL = 4  # tokens whose T * K rows go one at a time: compiles in a third of the time


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def experts_of(seed: int, *leading: int) -> GatedWeights:
    """Distinct experts with outputs of order one, leaves [*leading, E, ...]."""
    return GatedWeights(
        w_gate=jnp.asarray(normal(seed, *leading, E, D, F)) * D**-0.5,
        w_up=jnp.asarray(normal(seed + 1, *leading, E, D, F)) * D**-0.5,
        w_down=jnp.asarray(normal(seed + 2, *leading, E, F, D)) * F**-0.5,
    )


def routing_of(topk_idx) -> Routing:
    """A routing with distinct weights, so that swapped ones show."""
    topk_idx = jnp.asarray(topk_idx, jnp.int32)
    weights = 0.1 + jnp.arange(topk_idx.size, dtype=jnp.float32).reshape(topk_idx.shape) / 40
    logits = jnp.zeros((topk_idx.shape[0], E), jnp.float32)
    return Routing(topk_idx=topk_idx, topk_weights=weights, router_logits=logits)


def topk_ids(pattern: str) -> np.ndarray:
    """int [T, K] ids: `spread`, `masked` tokens, `one` expert for all, few experts, `none`."""
    rng = np.random.default_rng(3)
    spread = np.stack([rng.choice(E, K, replace=False) for _ in range(T)])
    if pattern == "masked":
        spread[[0, 2, T - 1]] = E
    return {
        "spread": spread,
        "masked": spread,
        "one": np.full((T, K), 5),
        "few": np.stack([rng.permutation([1, 7]) for _ in range(T)]),
        "none": np.full((T, K), E),
    }[pattern]


PATTERNS = ("spread", "masked", "one", "few", "none")
