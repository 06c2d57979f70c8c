"""Kinds of predictors: the sizes that one says of itself are those that it was made with."""

import jax
import numpy as np

from moejax.predictors.kinds import KINDS, Predictor
from moejax.predictors.store import describe

SIZES = {
    "residual": dict(num_layers=4, d_model=6, num_experts=8, hidden=5),
    "history": dict(num_layers=4, num_experts=8, vocab_size=9, embedding=3, hidden=5, horizons=1),
    "llapor": dict(
        num_layers=5,
        d_model=6,
        num_experts=8,
        edge_components=2,
        middle_components=3,
        edge_hidden=4,
        middle_hidden=5,
    ),
    "path": dict(
        num_layers=4,
        num_experts=8,
        vocab_size=9,
        embedding=3,
        hidden=5,
        context=4,
        filters=2,
    ),
    "pre_attention": dict(num_layers=4, d_model=6, num_experts=8, hidden=5),
}


def predictors() -> dict[str, Predictor]:
    rng, key = np.random.default_rng(0), jax.random.key(0)
    shapes = jax.eval_shape(
        lambda: {name: KINDS[name].init(key, **sizes) for name, sizes in SIZES.items()}
    )
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), shapes)


def test_every_kind_says_its_sizes():
    assert {name: describe(p) for name, p in predictors().items()} == {
        name: (name, sizes) for name, sizes in SIZES.items()
    }
    assert SIZES.keys() == KINDS.keys()
