#!/bin/sh
# The tests. Options are pytest's, for instance: sh scripts/test.sh -k gate
set -eu
cd "$(dirname "$0")/.."
extras=dev
. scripts/install.sh
# One BLAS thread: bit-repeatable, and two test processes do not fight for the cores.
export OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# Bytecode is kept, or each worker would make that of all tests anew, and each process the package's.
unset PYTHONDONTWRITEBYTECODE
# Runs flush each file to the disk, thousands of times; where files are in memory that takes no time.
free=$(df -Pk /dev/shm 2>/dev/null | awk 'END { print $4 }')
if [ "${free:-0}" -gt 4000000 ]; then
  export PYTEST_DEBUG_TEMPROOT="${PYTEST_DEBUG_TEMPROOT:-/dev/shm}"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache
# One process's work of a minute, and nothing waits for it: types are checked beside the tests.
.venv/bin/mypy >.venv/types.log 2>&1 &
types=$!
# Each worker takes half of the tests, file after file, and who is through takes half of the other's
# rest: a fixture of a file is made once, and no worker waits for a long file at the end.
status=0
.venv/bin/python -m pytest -n 2 --dist worksteal --durations 12 "$@" || status=$?
wait "$types" || status=1
cat .venv/types.log
exit "$status"
