#!/usr/bin/env bash
# Builds .venv-transferqueue: TransferQueue 0.1.11, which benchmarks/reader.py reads beside the store (about 2 GB, about 2
# minutes).
#
# It runs on Ray, and its tensordict need not be the one that the store is tried with: hence an environment of its own. The
# torch is the one of .venv, so that neither side has the better one.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-transferqueue
${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trajstore needs Python 3.11 or newer; name one with PYTHON=")'
[ "$venv/installed" -nt tests/live/build_transferqueue.sh ] && exit 0
rm -rf "$venv"
${PYTHON:-python3} -m venv "$venv"
"$venv/bin/pip" --disable-pip-version-check --quiet install torch==2.13.0 ray==2.60.0 tensordict==0.10.0 TransferQueue==0.1.11
touch "$venv/installed"
