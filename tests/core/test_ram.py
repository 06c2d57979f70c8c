"""What is available is the least that anyone grants."""

import pytest

from moejax.core import ram
from moejax.core.errors import InputError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(ram, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(ram, "_CGROUP", tmp_path)
    return tmp_path


def test_the_smaller_of_system_and_container_counts(machine):
    assert ram.available_bytes() is None
    (machine / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert ram.available_bytes() == 500 * 1024
    (machine / "memory.max").write_text("max\n")
    assert ram.available_bytes() == 500 * 1024
    (machine / "memory.max").write_text("300000\n")
    (machine / "memory.current").write_text("200000\n")
    (machine / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert ram.available_bytes() == 150_000


def test_what_is_missing_is_said(machine):
    ram.check_host_memory(2**60, "the experts")  # no one says how much there is
    (machine / "meminfo").write_text("MemAvailable: 1 kB\n")
    ram.check_host_memory(1024, "the experts")
    with pytest.raises(InputError, match="too small for the experts: 1025 bytes.* 1 bytes "):
        ram.check_host_memory(1025, "the experts")
