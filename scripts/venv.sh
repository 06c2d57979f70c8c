# Sourced: makes and enters .venv, and installs the requirements files given as arguments, once for
# every state of these files.
if [ ! -x .venv/bin/python ]; then
  python=""
  candidates=(python3 python3.13 python3.12 python3.11)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: Python 3.11 or newer not found; set PYTHON to its path" >&2
    exit 2
  fi
  if ! "$python" -m venv .venv; then
    rm -rf .venv # half made, it would be taken for a whole one
    echo "error: $python cannot make a virtual environment; see above" >&2
    exit 2
  fi
fi
# shellcheck disable=SC1091
source .venv/bin/activate
for file in "$@"; do
  # A file may include others (-r), so the stamp covers all of them.
  stamp=".venv/installed-$file-$(cat requirements*.txt pyproject.toml | cksum | cut -d' ' -f1)"
  if [ ! -e "$stamp" ]; then
    echo "installing $file into .venv" >&2
    python -m pip install --quiet --disable-pip-version-check -r "$file"
    python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    touch "$stamp"
  fi
done
