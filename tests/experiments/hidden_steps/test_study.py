"""What the study refuses before it computes."""

import pytest

from experiments.hidden_steps import study
from moejax.core.errors import InputError
from moejax.data.domains import DomainsConfig
from moejax.data.text import TextConfig


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="has no corpus.npz; train there first"):
        study.load_corpus(tmp_path, DomainsConfig())
    with pytest.raises(InputError, match="checkpoints does not exist"):
        study.load_model(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_run_on_bytes(tmp_path):
    with pytest.raises(InputError, match="reads bytes; hidden_predictors wants several domains"):
        study.load_corpus(tmp_path, TextConfig())
