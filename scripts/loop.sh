#!/bin/sh
# Online Feedback Distillation on the pair that comes with the package: minutes on any CPU, no network.
# Options are those of `mlx-fd loop`, for instance: sh scripts/loop.sh --episodes 64
set -eu
cd "$(dirname "$0")/.."
extras=""
. scripts/install.sh
# Matrices this small gain nothing from more threads, and with one a seed gives one run to the last bit.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
exec .venv/bin/mlx-fd loop --preset tiny "$@"
