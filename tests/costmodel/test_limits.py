import json

import pytest

from moejax.core.errors import InputError
from moejax.costmodel.limits import limit_report


def test_a_link_bound_step():
    report = limit_report(
        bytes_per_step=50e6, link_bytes_per_s=25e9, device_s=0.5e-3, measured_s=4e-3
    )
    assert report.limit == "link"
    assert report.bound_s == report.link_s == pytest.approx(2e-3)
    assert report.achieved_fraction == pytest.approx(0.5)
    assert report.link_utilisation == pytest.approx(0.5)
    assert report.to_text() == (
        "50.00 MB per step; bound 2 ms by the link (device 0.5 ms, link 2 ms); "
        "measured 4 ms, 50% of the bound, link busy 50%"
    )


def test_a_device_bound_step():
    report = limit_report(
        bytes_per_step=50e6, link_bytes_per_s=25e9, device_s=3e-3, measured_s=4e-3
    )
    assert report.limit == "device"
    assert report.bound_s == pytest.approx(3e-3)
    assert report.achieved_fraction == pytest.approx(0.75)
    assert report.link_utilisation == pytest.approx(0.5)


def test_the_host_shares_the_work():
    report = limit_report(
        bytes_per_step=50e6, link_bytes_per_s=25e9, device_s=0.1e-3, host_bytes_per_s=75e9
    )
    assert report.limit == "link and host"
    assert report.bound_s == pytest.approx(0.5e-3)


def test_nothing_to_move_is_bound_by_the_device():
    report = limit_report(bytes_per_step=0, link_bytes_per_s=25e9, device_s=1e-3)
    assert (report.limit, report.bound_s) == ("device", 1e-3)


def test_without_a_measurement_there_is_no_fraction():
    report = limit_report(bytes_per_step=1e6, link_bytes_per_s=1e9, device_s=0)
    assert report.achieved_fraction is None and report.link_utilisation is None
    assert "measured" not in report.to_text()
    assert json.loads(json.dumps(report.to_dict()))["limit"] == "link"


@pytest.mark.parametrize(
    "wrong",
    [
        {"link_bytes_per_s": 0},
        {"bytes_per_step": -1},
        {"device_s": -1.0},
        {"host_bytes_per_s": -1.0},
        {"measured_s": 0.0},
    ],
)
def test_impossible_figures_are_refused(wrong):
    given = {"bytes_per_step": 1, "link_bytes_per_s": 1, "device_s": 1.0, **wrong}
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"{name}={value} must"):
        limit_report(**given)
