"""Tokens of a run: nothing of the text is lost, the folder decides, sides stay apart."""

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data import domains
from moejax.data.bpe import encode, load_tokens, spans_by_domain, train_bpe
from moejax.data.domains import Document, DomainsConfig

WORDS = ["alpha", "beta", "gamma \N{SNOWMAN}", "<|end|>", "def f(x):\n    return x\n"]


def documents(domain):
    rng = np.random.default_rng(0)
    return [(f"{i}", " ".join(rng.choice(WORDS, 200))) for i in range(10)]


@pytest.fixture
def two_domains(monkeypatch):
    readers = {name: lambda rng, name=name: iter(documents(name)) for name in ("one", "two")}
    monkeypatch.setattr(domains, "DOMAINS", readers)


CFG = DomainsConfig(vocab_size=280, heldout_fraction=0.2)


def test_tokens_lose_nothing_and_end_is_token_zero():
    texts = [Document(f"a/{name}", text) for name, text in documents("a")]
    tokenizer = train_bpe(texts, 280)
    split = encode(tokenizer, texts)
    assert split.data.dtype == np.uint16 and split.data.max() < 280
    for span, document in zip(split.spans, texts, strict=True):
        tokens = split.data[span.start : span.stop]
        assert tokenizer.decode(tokens.tolist()) == document.text
        assert split.data[span.stop] == 0 and not (tokens == 0).any()
    assert (split.data == 0).sum() == len(texts)
    assert len(split.data) < 0.7 * sum(len(d.text.encode()) for d in texts)


def test_the_folder_keeps_the_corpus(tmp_path, two_domains, monkeypatch):
    made = load_tokens(CFG, tmp_path)
    monkeypatch.setattr(domains, "DOMAINS", {})  # other packages are installed now
    again = load_tokens(CFG, tmp_path)
    for side in ("train", "heldout"):
        np.testing.assert_array_equal(getattr(made, side).data, getattr(again, side).data)
        assert getattr(made, side).spans == getattr(again, side).spans
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.npz", "tokenizer.json"]
    held = spans_by_domain(made.heldout)
    assert {name: len(spans) for name, spans in held.items()} == {"one": 2, "two": 2}
    names = {s.name for s in made.train.spans} & {s.name for s in made.heldout.spans}
    assert not names


def test_another_config_is_refused(tmp_path, two_domains):
    load_tokens(CFG, tmp_path)
    with pytest.raises(InputError, match="corpus.npz was made with .*choose another folder"):
        load_tokens(DomainsConfig(vocab_size=281, heldout_fraction=0.2), tmp_path)


def test_too_little_text_for_the_vocabulary(tmp_path, two_domains):
    with pytest.raises(InputError, match="the text gives .* entries, not 60000"):
        load_tokens(DomainsConfig(vocab_size=60000), tmp_path)


def test_a_damaged_corpus_is_refused(tmp_path):
    (tmp_path / "corpus.npz").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="corpus.npz is no corpus"):
        load_tokens(CFG, tmp_path)
