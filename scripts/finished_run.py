"""A run of `mlx-fd loop` for a benchmark: begun, gone on with, or there already."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def finished_run(folder: Path, options: Sequence[str]) -> Path:
    """The run directory, its run finished.

    Args:
        folder: the run directory.
        options: of ``mlx-fd loop``, where the run was not begun yet.
    """
    if (folder / "summary.json").exists():
        return folder
    if (folder / "manifest.json").exists():
        command = ["resume", str(folder)]
    else:
        command = ["loop", *options, "--out", str(folder)]
    print("$ mlx-fd", *command, flush=True)
    subprocess.run(
        [sys.executable, "-P", "-m", "mlx_fd", *command, "--quiet", "--json"],
        env={"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder
