"""The training step of the quickstart at toy size: scores, load, resuming, refusals."""

import numpy as np
import pytest

from configs.quickstart import get_config
from experiments.quickstart_steps.train import checkpoint_folder, run_training
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.overlay import overlay
from moejax.models.restore import restore_params

TINY = [
    "model.num_layers=2",
    "model.d_model=16",
    "model.d_ff=8",
    "model.router.num_experts=4",
    "model.router.top_k=2",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=8",
    "train.horizon_steps=3",
    "train.batch_size=1",
    "train.seq_len=4",
    "eval_bytes=40",
    "eval_batch_size=1",
]


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(40):
        (data / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 5)
    return data


def test_trains_scores_and_resumes(folder, tmp_path):
    cfg = overlay(get_config(), [*TINY, f"data.path={folder}"])
    first = run_training(cfg, tmp_path / "work", show_progress=False)
    assert set(first.bits) == {"model", "bigram", "trigram"}
    assert first.scored_bytes == 40
    # Four identical lines per file: the n-grams know them, three steps do not.
    assert first.bits["trigram"] < first.bits["bigram"] < first.bits["model"] < 10
    assert first.expert_load.shape == (2, 4)
    assert first.expert_load.sum(1).tolist() == [40 * 2] * 2
    again = run_training(cfg, tmp_path / "work", show_progress=False)
    assert again.result.resumed_step == 3
    assert again.bits == first.bits
    np.testing.assert_array_equal(again.expert_load, first.expert_load)
    restored, model = restore_params(
        checkpoint_folder(tmp_path / "work"), first.model, mesh=make_mesh()
    )
    experts = restored.groups[0].mlp.experts
    assert model == first.model and experts.w_up.sharding.memory_kind == "pinned_host"
    want = first.result.state.params.groups[0].mlp.experts.w_up
    np.testing.assert_array_equal(np.asarray(experts.w_up), np.asarray(want))


@pytest.mark.parametrize(
    "change,message",
    [
        ("eval_bytes=0", "eval_bytes=0 must be at least 1"),
        ("train.seq_len=100000", "training bytes, one batch of batch_size=1 sequences"),
        ("data.path=/does/not/exist", "/does/not/exist does not exist"),
        ("model.router.top_k=5", "top_k=5 must be between 1 and num_experts=4"),
        ("model.head_dim=7", "head_dim=7 must be positive and even"),
    ],
)
def test_refuses_before_it_trains(folder, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        cfg = overlay(get_config(), [*TINY, f"data.path={folder}", change])
        run_training(cfg, tmp_path / "work", show_progress=False)
    assert not (tmp_path / "work").exists()
