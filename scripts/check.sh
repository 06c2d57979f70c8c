#!/usr/bin/env bash
# Static checks: lint, format, types, layering.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt
ruff check .
ruff format --check .
pyrefly check
lint-imports
