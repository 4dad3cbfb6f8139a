#!/usr/bin/env bash
# Builds .venv-sglang: SGLang 0.5.23, whose server runs on a CPU with the stand-ins of sglang_cpu/ (7 GB; two to ten
# minutes).
#
# SGLang's own requirements name CUDA builds. So it and what it needs in fixed versions are installed without
# requirements, and the rest, all of which runs anywhere, by name. pip then lists what it misses; the server does not.
set -euo pipefail
cd "$(dirname "$0")/../.."
script=tests/live/build_sglang.sh venv=.venv-sglang
pip() { "$venv/bin/pip" --disable-pip-version-check --quiet "$@" 2> >(grep -v "^sglang .* requires\|dependency resolver" >&2); }
if [ ! "$venv/engine" -nt "$script" ]; then
  ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the versions of this SGLang are tried with Python 3.11 only; name one with PYTHON=")'
  echo "Building $venv (7 GB; two to ten minutes) ..."
  rm -rf "$venv"
  ${PYTHON:-python3} -m venv "$venv"
  pip install torch==2.14.1 transformers==5.19.0 tokenizers==0.23.2
  pip install --no-deps sglang==0.5.23 "torchvision>=0.29,<0.30" apache-tvm-ffi==0.1.11 xgrammar==0.2.7 \
    outlines==0.1.11 outlines_core==0.1.26 openai==2.8.0 openai-harmony==0.0.4 compressed-tensors==0.18.0 \
    timm==1.0.25 numba==0.65.1 blobfile==3.0.0
  pip install "numpy<2.4" "llvmlite<0.48" "python-dateutil<3" IPython aiohttp airportsdata cloudpickle datasets dill \
    diskcache distro easydict einops fastapi gguf httpx interegular jiter jsonschema lark llguidance loguru lxml \
    mistral_common modelscope msgspec multiprocess nest_asyncio nvidia-ml-py orjson pandas partial_json_parser pillow \
    prometheus-client psutil pyarrow pybase64 pycountry pycryptodomex pydantic-extra-types python-multipart pyzmq \
    requests scipy sentencepiece setproctitle sniffio soundfile tiktoken torch_memory_saver uvicorn uvloop watchfiles \
    xxhash zstandard pytest pytest-timeout
  touch "$venv/engine"
fi
if [ ! "$venv/installed" -nt pyproject.toml ] || [ ! "$venv/installed" -nt "$venv/engine" ]; then
  pip install --editable '.[embedded,sglang-client]' "numpy<2.4"
  touch "$venv/installed"
fi
