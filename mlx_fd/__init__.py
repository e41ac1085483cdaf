"""mlx-fd: Online Feedback Distillation on Apple Silicon with MLX."""

from mlx_fd.models.backend import load_blas

__version__ = "0.2.0"

# Before anything imports MLX, whose BLAS symbols bind once.
load_blas()
