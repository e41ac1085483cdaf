#!/bin/sh
# GSM8K's first 100 test problems for a run, an adapter or a model, in minutes on a Mac.
# Options are those of `mlx-fd eval`: sh scripts/fast_gsm8k.sh runs/mine --baselines
# Without a model: SmolLM2-135M, whose weights come with a Python package.
set -eu
cd "$(dirname "$0")/.."
extras=""
. scripts/install.sh
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"
[ $# -gt 0 ] || set -- smollm2-135m
exec .venv/bin/mlx-fd eval "$@" --suite fast --problems gsm8k
