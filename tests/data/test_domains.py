"""Text of every machine: four kinds, split by file, no file on both sides."""

import pytest

from moejax.core.errors import InputError
from moejax.data import domains
from moejax.data.domains import DomainsConfig, read_domains


@pytest.fixture(scope="module")
def sides():
    return read_domains(DomainsConfig(domain_bytes=40_000, heldout_fraction=0.3))


def test_every_domain_has_text_on_both_sides(sides):
    assert list(sides) == ["python", "docs", "legal", "headers"]
    for domain, (train, heldout) in sides.items():
        names = [d.name for d in train + heldout]
        assert len(train) >= 1 and len(heldout) >= 1
        assert len({*names}) == len(names)
        assert all(name.startswith(f"{domain}/") for name in names)
        assert all(len(d.text) >= 400 for d in train + heldout)
        assert sum(len(d.text) for d in [*train, *heldout][:-1]) > 0


def test_domains_are_what_they_say(sides):
    text = {name: "\n".join(d.text for d in a + b) for name, (a, b) in sides.items()}
    assert "import " in text["python"] and "#define" in text["headers"]
    assert "copyright" in text["legal"].lower() or "licen" in text["legal"].lower()
    # Docstrings hold no code of the modules that they come from.
    assert text["docs"].count("\nimport ") < text["python"].count("\nimport ")


def test_repeated_paragraphs_are_kept_once(sides):
    paragraphs = [
        " ".join(p.split()).lower()
        for d in sides["legal"][0] + sides["legal"][1]
        for p in d.text.split("\n\n")
        if p.strip()
    ]
    assert len({*paragraphs}) == len(paragraphs)


def test_a_draw_of_whole_files_up_to_a_size(monkeypatch):
    files = [(f"{i}", "x" * 500) for i in range(50)] + [("short", "x")]
    monkeypatch.setattr(domains, "DOMAINS", {"one": lambda rng: iter(files)})
    train, heldout = read_domains(DomainsConfig(domain_bytes=5000, heldout_fraction=0.2))["one"]
    assert [d.name for d in heldout] == ["one/0", "one/1"]
    assert [d.name for d in train] == [f"one/{i}" for i in range(2, 10)]


def test_a_domain_without_files_is_named(monkeypatch):
    monkeypatch.setattr(domains, "DOMAINS", {"none": lambda rng: iter([("a", "x" * 500)])})
    with pytest.raises(InputError, match="domain none: 1 files, want at least 2"):
        read_domains(DomainsConfig())


@pytest.mark.parametrize(
    "wrong",
    [dict(vocab_size=256), dict(vocab_size=65537), dict(domain_bytes=0), dict(heldout_fraction=0)],
)
def test_wrong_config(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        DomainsConfig(**wrong)
