"""The text of a run, and what does not fit its model."""

import dataclasses
import pathlib

import pytest

from configs import byte_moe, second_model
from experiments.train_steps.load_data import load_data, with_path
from moejax.core.errors import InputError
from moejax.data.text import TextConfig


def test_a_model_of_other_tokens_is_refused(tmp_path):
    cfg = second_model.get_config()
    small = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=256))
    with pytest.raises(InputError, match="model.vocab_size=256, but the data has 4096"):
        load_data(small, tmp_path)
    large = byte_moe.get_config()
    large = dataclasses.replace(large, model=dataclasses.replace(large.model, vocab_size=512))
    with pytest.raises(InputError, match="model.vocab_size=512, but the data has 256"):
        load_data(large, tmp_path)


def test_bytes_come_from_the_path(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    data = with_path(TextConfig(), str(tmp_path))
    cfg = dataclasses.replace(byte_moe.get_config(), data=data)
    corpus = load_data(cfg, pathlib.Path("unused"))
    assert len(corpus.train.data) > len(corpus.heldout.data) > 0


def test_several_domains_have_no_path():
    with pytest.raises(InputError, match="--data=/x: this config reads text of several domains"):
        with_path(second_model.get_config().data, "/x")


def test_the_second_model_is_not_a_toy():
    cfg = second_model.get_config()
    model = cfg.model.decoder()
    assert model.num_moe_layers >= 12 and model.moe.num_experts >= 64
    assert model.vocab_size == cfg.data.vocab_size
