"""Text of four kinds that every machine with this library has, read by file.

    python    source of the standard library
    docs      docstrings of the packages that moejax needs, a document per module
    legal     licences and descriptions of installed packages; of repeated paragraphs the first
    headers   C and C++ headers of Python and of the packages that moejax needs

Versions of the packages differ between machines, so the text does too; `moejax.data.bpe` keeps what
a run has read beside its checkpoints.
"""

import ast
import dataclasses
import importlib.metadata
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moejax.core.errors import check, check_seed

_MIN_CHARACTERS = 400  # shorter documents teach nothing
_LICENCES = ("LICEN", "COPYING", "NOTICE", "METADATA")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainsConfig:
    """How much of each kind, its split, and its tokens.

    Attributes:
        vocab_size: entries of the byte-pair encoding that is trained on the training side.
        domain_bytes: characters of one kind at most; whole files, drawn at random.
        heldout_fraction: share of the files of each kind that is held out.
        seed: of the draw and of the split.
    """

    vocab_size: int = 4096
    domain_bytes: int = 8 << 20
    heldout_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        check(
            257 <= self.vocab_size <= 65536,
            f"vocab_size={self.vocab_size} must be between 257 (bytes and an end) and 65536",
        )
        check(self.domain_bytes >= 1, f"domain_bytes={self.domain_bytes} must be at least 1")
        fraction = self.heldout_fraction
        check(0 < fraction < 1, f"heldout_fraction={fraction} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Document:
    """One file's text; `name` starts with its domain and a slash."""

    name: str
    text: str


def read_domains(cfg: DomainsConfig) -> dict[str, tuple[list[Document], list[Document]]]:
    """Training and held-out documents of every domain.

    Raises `InputError` that names a domain with fewer than two. Cost: reading and, for docstrings,
    parsing up to `domain_bytes` of each: about half a minute.
    """
    sides = {}
    for place, (domain, read) in enumerate(DOMAINS.items()):
        rng = np.random.default_rng((cfg.seed, place))
        documents = _take(domain, read(rng), cfg.domain_bytes)
        check(len(documents) >= 2, f"domain {domain}: {len(documents)} files, want at least 2")
        count = max(1, round(len(documents) * cfg.heldout_fraction))
        # The draw is in random order, so the first are a sample.
        sides[domain] = documents[count:], documents[:count]
    return sides


def _take(domain: str, files: Iterable[tuple[str, str]], limit: int) -> list[Document]:
    taken, total = [], 0
    for name, text in files:
        if len(text) < _MIN_CHARACTERS:
            continue
        taken.append(Document(f"{domain}/{name}", text))
        total += len(text)
        if total >= limit:
            break
    return taken


def _read_python(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not {"site-packages", "dist-packages"} & {*p.parts}]
    yield from _texts(rng, paths, root)


def _read_docs(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    paths = [p for p in _files_needed(".py") if "tests" not in p.parts]
    for name, source in _texts(rng, paths, _site()):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates of code, and NUL bytes
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield name, "\n\n".join(text for text in found if text)


def _read_legal(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    # Their own folders: lists of all files are long.
    folders = [p for p in _site().glob("*.dist-info/**/*") if p.is_file()]
    paths = [p for p in folders if any(word in p.name.upper() for word in _LICENCES)]
    seen: set[str] = set()
    for name, text in _texts(rng, paths, _site()):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split()).lower()
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        yield name, "\n\n".join(fresh)


def _read_headers(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    include = pathlib.Path(sysconfig.get_path("include"))
    yield from _texts(rng, [*_files_needed(".h"), *include.rglob("*.h")], include.parent)


DOMAINS: dict[str, Callable[[np.random.Generator], Iterator[tuple[str, str]]]] = {
    "python": _read_python,
    "docs": _read_docs,
    "legal": _read_legal,
    "headers": _read_headers,
}


def _texts(
    rng: np.random.Generator, paths: Iterable[pathlib.Path], root: pathlib.Path
) -> Iterator[tuple[str, str]]:
    """Readable UTF-8 files in random order, without their doubles; names below `root`."""
    ordered, seen = sorted({*paths}), set()
    for i in rng.permutation(len(ordered)):
        path = ordered[i]
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # moved away, or deliberately in another encoding
            continue
        if "\0" in text or text in seen:
            continue
        seen.add(text)
        inside = path.is_relative_to(root)
        yield (path.relative_to(root) if inside else path).as_posix().lstrip("/"), text


def _site() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("purelib"))


def _files_needed(suffix: str) -> list[pathlib.Path]:
    """Such files of the distributions that moejax needs, and of those that they need."""
    wanted, seen, files = ["moejax"], set(), []
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # wanted on other platforms only
        if name != "moejax":
            named = [file for file in found.files or [] if file.suffix == suffix]
            files += [pathlib.Path(str(file.locate())) for file in named]
        needs = [need for need in found.requires or [] if "extra ==" not in need]
        wanted += [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs]
    return files
