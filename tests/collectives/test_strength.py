import doctest

import pytest

from moejax.collectives import strength as module
from moejax.collectives.strength import adaptive_densities, balanced_densities
from moejax.core.errors import InputError
from moejax.costmodel.links import Link

FAST, SLOW = Link(alpha_s=1e-5, beta_s_per_byte=1e-9), Link(alpha_s=1e-3, beta_s_per_byte=1e-8)


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_only_slow_links_compress():
    densities = adaptive_densities({"wan": 10.0, "lan": 1.0, "chip": 0.01}, 20)
    assert densities == {"wan": 1 / 60, "lan": pytest.approx(1 / 6), "chip": 1.0}


def test_balanced_links_finish_together():
    links, nbytes = {"fast": FAST, "slow": SLOW}, 1e6
    densities = balanced_densities(links, nbytes, 0.01)
    assert densities["slow"] == pytest.approx(0.01) and densities["fast"] > 0.1
    seconds = [links[k].seconds(2 * nbytes * d) for k, d in densities.items()]
    assert seconds[0] == pytest.approx(seconds[1])
    free = Link(alpha_s=0.0, beta_s_per_byte=0.0)
    assert balanced_densities({"free": free, "slow": SLOW}, nbytes, 0.9)["free"] == 1.0
    assert balanced_densities(links, nbytes, 0.9)["fast"] == 1.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: adaptive_densities({"a": 1.0}, 0.5), "ratio=0.5 must be at least 1"),
        (lambda: adaptive_densities({"a": 0.0}, 2), "must be positive"),
        (lambda: adaptive_densities({}, 2), "must be positive"),
        (lambda: balanced_densities({"a": FAST}, 1e6, 0.0), r"density=0.0 must be in \(0, 1\]"),
        (lambda: balanced_densities({"a": FAST}, 0, 0.1), "nbytes=0 must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
