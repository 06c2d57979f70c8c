#!/usr/bin/env bash
# Smoke test on Python 3.12 or newer, where pip takes a newer jax than the baseline's 0.10.2.
# Says so in one line when no such interpreter is found.
set -euo pipefail
cd "$(dirname "$0")/.."
found=""
for candidate in python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    found="$candidate"
    break
  fi
done
if [ -z "$found" ]; then
  echo "smoke test on newer Python: skipped, no Python 3.12 or 3.13 found"
  exit 0
fi
stamp=".venv-newer/installed-$(cat requirements.txt scripts/smoke_newer_python.sh | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  rm -rf .venv-newer
  "$found" -m venv .venv-newer
  .venv-newer/bin/pip install --quiet --disable-pip-version-check -r requirements.txt pytest safetensors
  touch "$stamp"
fi
.venv-newer/bin/python -c 'import sys, jax; print(f"smoke test: Python {sys.version.split()[0]}, jax {jax.__version__}")'
# One engine that decodes past device memory, with its slots, waves and predictor, is enough here.
exec env JAX_PLATFORMS=cpu NPROC=16 .venv-newer/bin/python -m pytest -p no:cacheprovider -q \
  tests/core tests/offload/test_slots.py tests/serving/test_engine.py::test_preloaded_engine_never_misses
