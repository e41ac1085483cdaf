"""The command line: one file per command, named like it; what they print is in ``terminal``."""

from mlx_fd.cli.app import cli, main

__all__ = ["cli", "main"]
