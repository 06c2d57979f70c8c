#!/usr/bin/env bash
# Everything that guards a merge, in under 20 minutes on two cores. `--full` adds soak and large
# parity runs. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# Parity is against transformers on torch, which is installed first.
source scripts/venv.sh requirements-dev.txt requirements-parity.txt
export JAX_PLATFORMS=cpu
# Eight CPU devices on two cores can deadlock in collectives unless the thread pool is larger.
export NPROC=16
scripts/check.sh
scripts/smoke_newer_python.sh
exec python -m pytest -n 2 --dist loadfile "$@"
