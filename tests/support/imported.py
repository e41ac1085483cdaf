"""What a command imports, imported once: `support.shell` forks commands from such a process."""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import pytest  # noqa: F401  # multiprocessing imports the parent's main module into each fork

import mlx_fd
from mlx_fd.models.backend import backend
from mlx_fd.problems import arithmetic
from mlx_fd.problems.sources import gsm8k

backend()
for module in pkgutil.walk_packages(mlx_fd.__path__, "mlx_fd."):
    if module.name != "mlx_fd.__main__":
        import_module(module.name)

# A process reads these once.
for split in ("train", "test"):
    gsm8k.load(split)
    arithmetic.load(split)

# A fork has one thread; where there are more, it would wait for them for ever.
if sys.platform == "linux":
    assert len([*Path("/proc/self/task").iterdir()]) == 1
