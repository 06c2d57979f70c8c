"""Predictors come back bit-equal, and nothing else comes back."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.predictors import store
from tests.predictors.test_kinds import predictors

# A restore that orbax gives up on leaves coroutines behind that were never awaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_here():
    """Finds those coroutines in this module, where they are expected."""
    yield
    gc.collect()


@pytest.mark.parametrize("kind", ["residual", "llapor"])
def test_round_trip(tmp_path, kind):
    params = predictors()[kind]
    store.save_predictor(tmp_path / "p", jax.tree.map(np.zeros_like, params))
    store.save_predictor(tmp_path / "p", params)  # replaces the first
    back = store.restore_predictor(tmp_path / "p")
    assert type(back) is type(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert all(not leaf.committed for leaf in jax.tree.leaves(back))
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["params", "predictor.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "p"
    store.save_predictor(folder, predictors()["residual"])
    return folder


def header(**changes) -> str:
    config = {"num_layers": 4, "d_model": 6, "hidden": 5, "num_experts": 8}
    good = {"format": "moejax.predictor", "version": 1, "kind": "residual", "config": config}
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "not a moejax.predictor file"),
        (header(format="other"), "not a moejax.predictor file"),
        (header(version=2), "version 2, this program reads 1"),
        (header(kind="oracle"), "kind 'oracle', expected one of"),
        (header(config={"num_layers": 4}), "expected positive sizes"),
        (
            header(config={"num_layers": 4, "d_model": 6, "hidden": 7, "num_experts": 8}),
            "cannot restore this residual predictor",
        ),
    ],
)
def test_foreign_headers_are_refused(tmp_path, saved, text, message):
    folder = tmp_path / "p"
    shutil.copytree(saved, folder)
    (folder / "predictor.json").write_text(text)
    with pytest.raises(InputError, match=message):
        store.restore_predictor(folder)


def test_missing_and_truncated_are_refused(tmp_path, saved):
    with pytest.raises(InputError, match="is this a saved predictor"):
        store.restore_predictor(tmp_path)
    folder = tmp_path / "p"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "params")
    with pytest.raises(InputError, match="cannot restore"):
        store.restore_predictor(folder)
    shutil.copytree(saved / "params", folder / "params")
    data = [p for p in (folder / "params").rglob("*") if p.is_file() and "/d/" in str(p)]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot restore"):
        store.restore_predictor(folder)
