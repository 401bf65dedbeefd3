#!/usr/bin/env bash
# Makes .venv with all that blrlab needs on this machine; with an NVIDIA GPU, JAX and PyTorch use it.
#   bash setup.sh         to run experiments
#   bash setup.sh dev     and the tools of `make check`
# PYTHON=python3.12 picks the interpreter of a new .venv. A PyTorch that is already in .venv stays, unless
# TORCH=torch==2.11.0 picks another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
  echo "error: blrlab needs Python 3.11 to 3.13; name one: PYTHON=python3.11 bash setup.sh" >&2
  exit 2
fi
[ -e .venv/pyvenv.cfg ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv && "$python" -m venv .venv; }
install() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }

extras=torch,triton
torch=torch==2.13.0
if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0 2>/dev/null); then
  torch=torch
  if [ "${driver%%.*}" -ge 580 ]; then extras+=,cuda13; else extras+=,cuda12; fi
fi
[ "${1:-}" = dev ] && extras+=,dev

stamp=.venv/.blrlab-setup
wanted="$extras ${TORCH:-} $(cat pyproject.toml ops/pyproject.toml setup.sh | cksum)"
made=$(cat $stamp 2>/dev/null || true)
[ "${made/,dev/}" = "${wanted/,dev/}" ] && [[ "$made" == *,dev* || "$wanted" != *,dev* ]] && exit 0
echo "setting up .venv: $extras (a few minutes the first time)"
if [ -n "${TORCH:-}" ]; then
  install "$TORCH"
elif ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  install "$torch" || install torch
fi
install -e ./ops -e ".[$extras]"
if [ -n "$driver" ] && ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "warning: PyTorch finds no CUDA here (driver $driver): the bridge and the torch and Triton benchmarks will be" >&2
  echo "left out. PyTorch's own site, under Get started, says which build fits; name it: TORCH=... bash setup.sh" >&2
fi
echo "$wanted" > $stamp
