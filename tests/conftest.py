"""Shared by all tests: one BLAS thread, caches that outlive nothing, and no network."""

import gc
import os
import signal

# Before MLX is imported anywhere: bit-repeatable sums, and no hub.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

from mlx_fd.models.backend import backend
from support.draws import ALL

# What a background job or nohup ignores stays ignored in every child, and in mlx-fd on purpose; the
# tests of signals need them as a terminal has them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)

# A third of what it takes to import all tests is the collector's, which finds nothing there.
gc.disable()

settings.register_profile(
    "mlx-fd",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    max_examples=100 if ALL else 50,
)
settings.load_profile("mlx-fd")


def pytest_collection_finish():
    """Collect garbage again, but look through no module and no test for it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _mlx():
    """MLX as the package sets it up."""
    return backend()
