"""``python -m mlx_fd`` is ``mlx-fd``."""

from mlx_fd.cli import main

main()
