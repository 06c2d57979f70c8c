import subprocess
import sys

import pytest

from moejax.aot.targets import TARGETS
from moejax.core.errors import InputError
from moejax.costmodel.hardware import CHIPS, MACHINES, get_chip, get_machine


def test_names_and_kinds_find_the_same_chip():
    assert get_chip("TPU v5 lite") is get_chip("v5e")
    assert get_chip("TPU v5") is get_chip("v5p")
    assert get_chip("NVIDIA H200") is get_chip("H200")


def test_unknown_hardware_is_listed():
    with pytest.raises(InputError, match="hardware 'abacus' is not one of v5e, v5p, v6e, 7x, A100"):
        get_chip("abacus")


def test_every_compile_target_has_a_row():
    for target in TARGETS.values():
        chip = get_chip(target.generation)
        chips = 1
        for side in target.name.partition(":")[2].split("x"):
            chips *= int(side)
        assert target.num_devices == chips * chip.devices_per_chip


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_have_the_right_order_of_magnitude(chip):
    # Operations per byte of memory traffic at the ridge, and memory against the link: a slipped
    # prefix or a bit taken for a byte leaves these ranges.
    assert 120 < chip.bf16_flops / chip.hbm_bytes_per_s < 600
    assert 30 < chip.hbm_bytes_per_s / chip.link_bytes_per_s < 200
    assert 2 < chip.hbm_bytes_per_s / chip.interconnect_bytes_per_s < 40
    assert 0.01 < chip.hbm_bytes / chip.hbm_bytes_per_s < 0.06


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_link_and_cores_share_the_memory_of_a_host(machine):
    assert machine.link_rate + machine.host_rate <= machine.dram_bytes_per_s
    assert 1.5 < machine.host_rate / machine.link_rate < 8
    assert 5 < machine.host_flops_per_s / machine.dram_bytes_per_s < 60


def test_unknown_hardware_rows_are_listed():
    with pytest.raises(InputError, match="hardware row 'PDP-10' is not one of RTX4090-PCIe3, RTX"):
        get_machine("PDP-10")


def test_kinds_are_not_claimed_twice():
    kinds = [kind for chip in CHIPS.values() for kind in chip.jax_kinds]
    assert len(kinds) == len(set(kinds))


def test_the_cost_model_loads_without_jax():
    code = (
        "import sys, moejax.costmodel.limits, moejax.costmodel.hardware; "
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
