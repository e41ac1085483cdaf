"""Pytest fixtures: a test file takes them with ``pytest_plugins = ["metal.fixtures"]``."""

import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fd.losses import kernels
from support.metal.emulator import Emulator


@pytest.fixture
def emulator(pytestconfig, monkeypatch):
    """An emulated GPU that MLX's two functions for kernels lead to."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs Linux and g++ (on Debian: apt install g++)")
    gpu = Emulator(Path(pytestconfig.cache.mkdir("emulator")))
    monkeypatch.setattr(mx.fast, "metal_kernel", gpu.metal_kernel)
    monkeypatch.setattr(mx.fast, "cuda_kernel", gpu.cuda_kernel)
    kernels._kernel.cache_clear()
    yield gpu
    kernels._kernel.cache_clear()
