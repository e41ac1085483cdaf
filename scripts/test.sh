#!/bin/sh
# The tests. Options are pytest's, for instance: sh scripts/test.sh -k gate
set -eu
cd "$(dirname "$0")/.."
extras=dev
. scripts/install.sh
# One BLAS thread: bit-repeatable, and two test processes do not fight for the cores.
export OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
