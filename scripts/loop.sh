#!/bin/sh
# Online Feedback Distillation on what needs no network: SmolLM2-135M and GSM8K.
# Options are those of `mlx-fd loop`, for instance: sh scripts/loop.sh --episodes 16
set -eu
cd "$(dirname "$0")/.."
extras=""
. scripts/install.sh
exec .venv/bin/mlx-fd loop --expert smollm2-135m --student smollm2-135m:layers=15 --preset quick "$@"
