"""Every method by its name; numbers without a meaning are refused."""

import dataclasses
import typing

import pytest

from moejax.checkpoint.config_json import from_json, to_json
from moejax.collectives.codecs import BlockQuant, TopK, TwoBit
from moejax.core.errors import InputError
from moejax.core.overlay import overlay
from moejax.sync.config import READS, Method, SyncConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    sync: SyncConfig = SyncConfig()


def set_(*items):
    return overlay(Holder(), [f"sync.{item}" for item in items]).sync


def test_every_method_has_its_fields():
    fields = {field.name for field in dataclasses.fields(SyncConfig)}
    assert set(READS) == set(typing.get_args(Method))
    for method, names in READS.items():
        assert set(names) <= fields
        assert set_(f"method={method}").method == method


def test_codecs_by_name():
    assert set_("method=streaming_diloco").make_codec() == BlockQuant(4, 32)
    assert set_("method=streaming_diloco", "codec=float32").make_codec() is None
    assert set_("method=diloco").make_codec() is None
    assert set_("method=gradients", "codec=int8").make_codec() == BlockQuant()
    top = set_("method=gradients", "codec=top_k", "kept=5", "block=100", "feedback=False")
    assert top.make_codec() == TopK(5, 100)
    assert set_("method=diloco", "codec=two_bit", "threshold=0.5").make_codec() == TwoBit(0.5)


def test_survives_json():
    cfg = set_("method=diloco", "every=4", "codec=int8")
    assert from_json(SyncConfig, to_json(cfg), "here") == cfg


@pytest.mark.parametrize(
    "items, message",
    [
        (["method=dilocco"], "sync.method wants"),
        (["every=4"], "every=4 has no meaning for method='none', codec=None"),
        (["method=local_sgd", "codec=int8"], "codec='int8' has no meaning for method='local_sgd'"),
        (["method=diloco", "feedback=False"], "feedback=False has no meaning for method='diloco'"),
        (["method=gradients", "codec=int8", "kept=3"], "kept=3 has no meaning"),
        (["method=gradients", "codec=top_k", "kept=2000"], "k=2000 must be between 1 and block"),
        (["method=diloco", "every=0"], "every=0 must be at least 1"),
        (["method=diloco", "outer_momentum=1.0"], r"momentum=1.0 must be in \[0, 1\)"),
        (["method=dream_ddp", "link_ratio=0.0"], "link_ratio=0.0 must be positive"),
        (["method=streaming_diloco", "keep_local=1.0"], "keep_local=1.0 must be"),
    ],
)
def test_what_does_not_fit_together_is_refused(items, message):
    with pytest.raises(InputError, match=message):
        set_(*items)
