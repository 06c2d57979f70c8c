#!/usr/bin/env bash
# Makes .venv, installs the runtime, runs the quickstart. Arguments go to experiments/quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
# Fresh buffers of a training step cost page faults; huge pages save them (Linux, glibc).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec python -m experiments.quickstart "$@"
