"""`scripts/test.sh` ends with the status of what it ran: nothing else tells CI of a failure."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _tree(folder: Path, *, smoke: int = 0, check: int = 0, suite: int = 0) -> Path:
    """A folder whose test.sh is the real one and whose parts end at once with these statuses."""
    scripts, tools = folder / "scripts", folder / "tools"
    scripts.mkdir()
    tools.mkdir()
    shutil.copy(SCRIPTS / "test.sh", scripts)
    parts = {
        scripts / "venv.sh": f'export PATH="{tools}:$PATH"',
        scripts / "smoke_newer_python.sh": f"echo smoke ran; exit {smoke}",
        scripts / "check.sh": f"exit {check}",
        tools / "python": f'echo "suite ran: $*"; exit {suite}',
    }
    for path, body in parts.items():
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return scripts / "test.sh"


def _run(script: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", script, "-k", "x"], capture_output=True, text=True, check=False)


def test_all_well_is_status_zero(tmp_path):
    done = _run(_tree(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "suite ran: -m pytest -n 2 --dist loadfile -k x" in done.stdout
    assert "smoke ran" in done.stdout


@pytest.mark.parametrize("part", ["smoke", "check", "suite"])
def test_a_part_that_fails_fails_the_whole(tmp_path, part):
    done = _run(_tree(tmp_path, **{part: 3}))
    assert done.returncode != 0
    assert ("suite ran" in done.stdout) == (part == "suite")
