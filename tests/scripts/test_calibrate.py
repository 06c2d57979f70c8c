"""Calibration of a mesh of CPU devices: what is fitted, and that it leads to a dispatch."""

import pytest
from absl import flags

from moejax.core.mesh import make_mesh
from moejax.costmodel.advice import Calibration, advise
from moejax.costmodel.hierarchy import candidate_levels
from scripts import calibrate


@pytest.fixture(autouse=True)
def parsed():
    flags.FLAGS(["calibrate", "--d_model=16", "--d_ff=8", "--rank_tokens=64"])
    yield
    flags.FLAGS.unparse_flags()


def test_every_level_and_the_product_are_fitted_and_advise():
    mesh = make_mesh(data=2, expert=4)
    fits, product = calibrate.calibrate(mesh, [8192, 16384, 65536], rounds=3)
    levels = {level for levels in candidate_levels(("data", "expert")) for level in levels}
    assert set(fits) == {"all_to_all", "all_gather", "reduce_scatter"}
    for by_level in fits.values():
        assert set(by_level) == levels
        assert all(fit.link.seconds(1024) > 0 and fit.r2 <= 1 for fit in by_level.values())
    found = Calibration(
        sizes={"data": 2, "expert": 4},
        exchange={level: fit.link for level, fit in fits["all_to_all"].items()},
        product=product.link,
    )
    advice = advise(found, calibrate.layer_of_flags())
    assert set(advice.choice.seconds) == set(candidate_levels(("data", "expert")))
