import importlib.util

import jax
import pytest

from moejax.aot.targets import TARGETS, get_target, target_devices, target_mesh
from moejax.core.errors import InputError


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("v5e:1x1", "TPU v5 lite", 1),
        ("v5e:2x2", "TPU v5 lite", 4),
        ("v6e:2x4", "TPU v6 lite", 8),
        ("v5p:2x2x1", "TPU v5", 4),
        ("7x:1x1x1", "TPU7x", 2),
        ("7x:2x2x1", "TPU7x", 8),
    ],
)
def test_devices_of_a_target(name, kind, count):
    devices = target_devices(name)
    assert [device.device_kind for device in devices] == [kind] * count
    assert get_target(name).num_devices == count


@pytest.mark.parametrize("name", TARGETS)
def test_every_named_target_exists(name):
    assert len(target_devices(name)) == TARGETS[name].num_devices


def test_the_default_backend_stays_the_cpu():
    target_devices("v5e:2x2")
    assert jax.default_backend() == "cpu"
    assert len(jax.devices()) == 8


def test_mesh_has_the_usual_axes():
    mesh = target_mesh("v5e:2x2", expert=4)
    assert mesh.axis_names == ("data", "expert", "model")
    assert dict(mesh.shape) == {"data": 1, "expert": 4, "model": 1}
    assert target_mesh("v5e:2x2").size == 1


def test_a_mesh_larger_than_the_target_is_refused():
    with pytest.raises(InputError, match="expert=8 model=1 wants 8 devices, found 4"):
        target_mesh("v5e:2x2", expert=8)


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "v5e", "", "h100"])
def test_unknown_targets_are_listed(name):
    with pytest.raises(InputError, match=f"target='{name}' is not one of v5e:1x1, v5e:2x2"):
        target_devices(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match="pip install -r requirements-dev.txt"):
        target_devices.__wrapped__("v5e:2x2")
