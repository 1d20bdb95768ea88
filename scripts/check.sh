#!/bin/sh
# Everything a change must pass; `make test` and continuous integration run exactly this.
# Arguments go to pytest: scripts/check.sh -m "not engine"
set -eux
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

ruff format --check .
ruff check .
mypy
python -m pytest "$@"
