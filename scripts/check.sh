#!/bin/sh
# Everything a change must pass; `make test` and continuous integration run exactly this.
# Arguments go to pytest: scripts/check.sh -m "not engine"
set -eux
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

ruff format --check .
ruff check .
mypy
# Two side by side (tests/conftest.py), in the order of the files so that the engines begin early;
# one where there is a GPU, most of whose memory an engine takes.
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then workers=0; else workers=2; fi
# Threads that wait by spinning would take the other one's core.
OMP_WAIT_POLICY=PASSIVE python -m pytest --numprocesses $workers --no-loadscope-reorder "$@"
