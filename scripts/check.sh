#!/bin/sh
# Everything a change must pass; `make test` and continuous integration run exactly this.
# Arguments go to pytest: scripts/check.sh -m "not engine"
set -eux
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

ruff format --check .
ruff check .
mypy
# Two side by side, in the order of the files so that the engines, one after another, begin early.
# Threads that wait by spinning would take the other one's core.
OMP_WAIT_POLICY=PASSIVE python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
