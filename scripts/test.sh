#!/usr/bin/env bash
# Everything that guards a merge, in under 20 minutes on two cores. `--full` adds soak and large
# parity runs. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# Beside the installation, which leaves a core idle.
newer="$(mktemp)"
scripts/smoke_newer_python.sh >"$newer" 2>&1 &
smoke=$!
# A trap's own failure would become the exit status: `kill` fails when the smoke test has ended.
trap 'kill "$smoke" 2>/dev/null || true; rm -f "$newer"' EXIT
# Parity is against transformers on torch, which is installed first.
source scripts/venv.sh requirements-dev.txt requirements-parity.txt
export JAX_PLATFORMS=cpu
# Eight CPU devices on two cores can deadlock in collectives unless the thread pool is larger.
export NPROC=16
scripts/check.sh
wait "$smoke" || { cat "$newer"; exit 1; }
cat "$newer"
python -m pytest -n 2 --dist loadfile "$@"
