#!/usr/bin/env bash
# Makes .venv with all that blrlab needs on this machine; with an NVIDIA GPU, JAX and PyTorch use it.
#   bash setup.sh         to run experiments
#   bash setup.sh dev     and the tools of `make check`
# PYTHON=python3.12 picks the interpreter. A PyTorch that is already in .venv stays; TORCH=torch==2.11.0 picks another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
  echo "error: blrlab needs Python 3.11 to 3.13; name one: PYTHON=python3.11 bash setup.sh" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
install() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }

extras=torch,triton
default_torch=torch==2.13.0
if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0 2>/dev/null); then
  default_torch=torch
  if [ "${driver%%.*}" -ge 580 ]; then extras+=,cuda13; else extras+=,cuda12; fi
fi
[ "${1:-}" = dev ] && extras+=,dev

stamp=.venv/.blrlab-setup
wanted="$extras $(cat pyproject.toml ops/pyproject.toml setup.sh | cksum)"
[ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && exit 0
echo "setting up .venv: $extras (a few minutes the first time)"
.venv/bin/python -c 'import torch' 2>/dev/null || install "${TORCH:-$default_torch}"
install -e ./ops -e ".[$extras]"
echo "$wanted" > $stamp
