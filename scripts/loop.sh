#!/bin/sh
# Online Feedback Distillation on the pair that comes with the package: minutes on any CPU, no network.
# Options are those of `mlx-fd loop`, for instance: sh scripts/loop.sh --episodes 64
set -eu
cd "$(dirname "$0")/.."
extras=""
. scripts/install.sh
exec .venv/bin/mlx-fd loop --preset tiny "$@"
