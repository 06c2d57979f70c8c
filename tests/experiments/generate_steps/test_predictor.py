"""What `--predictor` and `--predictor_dir` give, and the combinations that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generate_steps import predictor
from moejax.core.errors import InputError
from moejax.core.memory import nbytes
from moejax.layers.moe import MoEConfig
from moejax.models.config import moe_decoder
from moejax.models.decoder import init_decoder
from moejax.predictors.features import DECAYS
from moejax.predictors.history import init_history
from moejax.predictors.residual import init_residual
from moejax.predictors.store import save_predictor
from moejax.routing.config import RouterConfig
from moejax.serving.engine import split_experts

E, L, D, V = 4, 3, 16, 32


def decoder(zero=0, **changes):
    moe = MoEConfig(d_ff=8, router=RouterConfig(num_experts=E + zero, top_k=2), zero_experts=zero)
    sizes = dict(vocab_size=V, d_model=D, num_layers=L) | changes
    return moe_decoder(num_heads=2, num_kv_heads=1, head_dim=8, moe=moe, **sizes)


def ones_like(shapes):
    """Drawing weights takes longer to compile than all of these tests."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, leaf.dtype)), shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, key = tmp_path_factory.mktemp("predictors"), jax.random.key(0)
    sizes = dict(num_layers=L, d_model=D, num_experts=E, hidden=5)
    learned = jax.eval_shape(lambda: init_residual(key, **sizes))
    save_predictor(root / "learned", ones_like(learned))
    sizes = dict(vocab_size=V, embedding=3, hidden=5)
    history = jax.eval_shape(lambda: init_history(key, jnp.ones((L, E)), **sizes))
    save_predictor(root / "history", ones_like(history))
    return root


@pytest.fixture(scope="module")
def dense():
    init = lambda: split_experts(init_decoder(jax.random.key(1), decoder()), decoder())[0]  # noqa: E731
    return ones_like(jax.eval_shape(init))


def make(name, where, dense):
    learned = predictor.read_fitted(name, where, decoder())
    return predictor.make_prediction(name, learned, dense, decoder())


def test_every_name_gives_its_prediction(folder, dense):
    assert make("none", None, dense) is None
    routers = make("next_gate", None, dense).params
    assert routers.w_router.shape == (L, D, E)
    learned, beside = make("learned", str(folder / "learned"), dense).params
    np.testing.assert_array_equal(learned.scale, np.ones(L - 1))
    np.testing.assert_array_equal(beside.w_router, routers.w_router)
    history = make("history", str(folder / "history"), dense)
    state = history.init(history.params, 2)
    np.testing.assert_array_equal(state.ema, np.ones((L, 2, len(DECAYS), E)))


def test_the_bytes_of_a_prediction(folder):
    """Its weights, what it keeps of sequences, and routers where they must be copied to be one."""
    one = decoder()
    split = dataclasses.replace(
        one, groups=tuple(dataclasses.replace(one.groups[0], num_layers=n) for n in (1, 2))
    )
    routers = 4 * L * D * E
    # Averages [L, B, P, E], latents [B, C], the newest tokens [B].
    state = 4 * (L * 3 * len(DECAYS) * E + 3 * 3 + 3)
    cases = {"none": (0, 0), "next_gate": (0, routers), "learned": (0, routers)}
    for name, (kept, copied) in (cases | {"history": (state, 0)}).items():
        where = str(folder / name) if name in predictor.FITTED else None
        learned = predictor.read_fitted(name, where, one)
        assert predictor.device_bytes(name, learned, one, 3) == nbytes(learned) + kept
        assert predictor.device_bytes(name, learned, split, 3) == nbytes(learned) + kept + copied


def test_a_folder_goes_with_the_predictors_that_are_fitted():
    for name, where in (("none", None), ("next_gate", None), ("learned", "a"), ("history", "a")):
        predictor.check_flags(name, where)
    for name, where in (("none", "a"), ("next_gate", "a"), ("learned", None), ("history", None)):
        with pytest.raises(InputError, match="learned, history, .* want a folder"):
            predictor.check_flags(name, where)


def test_predictors_of_something_else_are_refused(folder, tmp_path):
    learned, history = str(folder / "learned"), str(folder / "history")
    cases = [
        ("learned", history, decoder(), "--predictor=learned: .* of kind history"),
        ("history", learned, decoder(), "--predictor=history: .* of kind residual"),
        ("learned", learned, decoder(d_model=24), "another model: d_model=16, not 24"),
        ("learned", learned, decoder(num_layers=2), "another model: num_layers=3, not 2"),
        ("history", history, decoder(vocab_size=9), "another model: vocab_size=32, not 9"),
        ("learned", str(tmp_path), decoder(), "predictor.json: No such file"),
        ("next_gate", None, decoder(zero=1), "does not serve a model with 1 experts without"),
    ]
    for name, where, cfg, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            predictor.read_fitted(name, where, cfg)
        assert "\n" not in str(caught.value)
