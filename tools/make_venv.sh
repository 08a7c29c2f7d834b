#!/usr/bin/env bash
# Create the virtual environment that `make` uses: make_venv.sh PYTHON DIRECTORY
#
# On a machine whose Python already has a torch that sees a GPU, that torch (and its Triton) is kept and used. On one
# with a GPU but no torch, pip chooses torch. Everywhere else constraints.txt pins both.
set -euo pipefail
python=$1
venv=$2
cd "$(dirname "$0")/.."

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "make_venv: keeping the torch of $python, which sees a GPU"
    "$python" -m venv --clear --system-site-packages "$venv"
    constraints=()
elif command -v nvidia-smi >/dev/null || command -v rocminfo >/dev/null; then
    echo "make_venv: a GPU but no torch that sees it; pip chooses torch"
    "$python" -m venv --clear "$venv"
    constraints=()
else
    echo "make_venv: no GPU; torch and Triton as in constraints.txt"
    "$python" -m venv --clear "$venv"
    constraints=(--constraint constraints.txt)
fi
"$venv/bin/python" -m pip install --quiet "${constraints[@]}" --editable '.[dev]'
"$venv/bin/python" -c 'import torch; print("make_venv: ready, torch", torch.__version__)'
touch "$venv/.ready"
