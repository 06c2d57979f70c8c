# Sourced: makes and enters .venv-gpu, with jax's CUDA plugin beside the jaxlib that it belongs to.
# No GPU, driver or CUDA library is needed: it only compiles (moejax/aot/gpu.py).
if [ ! -e .venv-gpu/installed ]; then
  rm -rf .venv-gpu
  "${PYTHON:-python3.11}" -m venv .venv-gpu
  .venv-gpu/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  version=$(.venv-gpu/bin/python -c 'from importlib.metadata import version; print(version("jaxlib"))')
  .venv-gpu/bin/pip install --quiet --disable-pip-version-check --no-deps \
    "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version"
  touch .venv-gpu/installed
fi
# shellcheck disable=SC1091
source .venv-gpu/bin/activate
