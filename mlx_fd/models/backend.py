"""Which MLX backend this machine has; imported before MLX everywhere in the package.

On Linux's CPU backend the BLAS inside MLX's wheel is the single-threaded reference one. Where the
machine has OpenBLAS (or Intel's MKL from its wheel) we load it into the global symbol scope first,
so that MLX's matrix products bind to it: 20 to 30 times faster in float32. Nothing depends on it.

OpenBLAS has kernels for each kind of CPU and takes its oldest ones, three to six times slower, on a
CPU that came after it. So it is told which: those for the instructions that the CPU says it has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_fd.errors import UserError

BLAS_VARIABLE = "MLX_FD_BLAS"
MATH_VARIABLE = "MLX_FD_CPU_MATH"
_SYSTEM_BLAS = ("libopenblas.so.0", "libopenblas.so")
KERNELS_VARIABLE = "OPENBLAS_CORETYPE"
# OpenBLAS's kernels, fastest first, and the instructions that they are made of.
_KERNELS = {
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}
_CPU_INFO = Path("/proc/cpuinfo")
# Of glibc's malloc.h; a block of 32 MB is the most that it keeps.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BLOCK, _KEPT = 32 * 2**20, 2**30
_INSTALL_HINT = (
    "MLX has no backend here. Install one of the extras:\n"
    '  pip install "mlx-fd[cpu]"     on Linux without an NVIDIA GPU\n'
    '  pip install "mlx-fd[cuda]"    on Linux with an NVIDIA GPU (CUDA 13; mlx-fd[cuda12] for 12)\n'
    "On Apple Silicon `pip install mlx-fd` brings Metal with it."
)


@dataclass(frozen=True)
class Blas:
    """The BLAS that was put before MLX's own.

    Attributes:
        name: the library's; ``None`` where none is used.
        note: one line for ``doctor``: what was found, or what would help.
        kernels: where it is OpenBLAS, for which kind of CPU the kernels are that it took.
    """

    name: str | None
    note: str
    kernels: str | None = None


@dataclass(frozen=True)
class Backend:
    """What MLX runs on.

    Attributes:
        device: ``"metal"``, ``"cuda"`` or ``"cpu"``.
        blas: what was put before MLX's own BLAS.
        cpu_math: whether :mod:`mlx_fd.models.cpu_math` stands in the place of three of MLX's
            functions.
    """

    device: str
    blas: Blas
    cpu_math: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether half precision and quantised products are slow scalar loops here."""
        return self.device == "cpu"


def _blas_candidates() -> list[str]:
    chosen = os.environ.get(BLAS_VARIABLE, "")
    if chosen:
        return [] if chosen == "off" else [chosen]
    wheels = [str(p) for p in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))]
    return [*_SYSTEM_BLAS, *wheels]


def kernels_for(cpu_info: str) -> str | None:
    """Which of OpenBLAS's kernels suit a CPU; ``None``: whatever it takes by itself.

    Args:
        cpu_info: what Linux says of the machine's processors; several have the same instructions.
    """
    flags = next((line for line in cpu_info.splitlines() if line.startswith("flags")), "")
    has = set(flags.partition(":")[2].split())
    return next((name for name, needs in _KERNELS.items() if needs <= has), None)


@contextmanager
def _kernels_chosen() -> Iterator[None]:
    """An OpenBLAS that is loaded meanwhile takes the kernels for this CPU."""
    kernels = None
    if KERNELS_VARIABLE not in os.environ:
        with suppress(OSError):
            kernels = kernels_for(_CPU_INFO.read_text(encoding="utf-8", errors="replace"))
    if kernels is None:
        yield
        return
    os.environ[KERNELS_VARIABLE] = kernels
    try:
        yield
    finally:
        # NumPy's own OpenBLAS is as new as NumPy.
        del os.environ[KERNELS_VARIABLE]


@functools.cache
def load_blas() -> Blas:
    """Put a fast BLAS in front of MLX's own, once per process."""
    if sys.platform != "linux":
        return Blas(None, "not needed: MLX uses Accelerate here")
    if "mlx.core" in sys.modules:
        return Blas(None, "not used: MLX was imported before mlx_fd")
    with _kernels_chosen():
        found = _loaded_blas()
    if found is not None:
        name, library = found
        kernels = _kernels_of(library)
        with_kernels = f" with its kernels for {kernels}" if kernels else ""
        gain = "float32 products about 20 times faster than MLX's bundled BLAS"
        return Blas(name, f"{name}{with_kernels} ({gain})", kernels)
    chosen = os.environ.get(BLAS_VARIABLE)
    if chosen == "off":
        return Blas(None, f"switched off by {BLAS_VARIABLE}=off")
    if chosen:
        slower = "CPU runs are 20 times slower"
        return Blas(None, f"{BLAS_VARIABLE}={chosen} cannot be loaded: {slower}")
    return Blas(
        None,
        "none found: CPU runs are about 20 times slower than they need be; "
        'install Debian\'s libopenblas0-pthread, or pip install "mlx-fd[mkl]"',
    )


def _loaded_blas() -> tuple[str, ctypes.CDLL] | None:
    """The first of the libraries that there is, loaded for all."""
    for name in _blas_candidates():
        with suppress(OSError):
            return name, ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return None


def _kernels_of(library: ctypes.CDLL) -> str | None:
    """What an OpenBLAS calls its kernels; ``None``: it is another library."""
    name_of = getattr(library, "openblas_get_corename", None)
    if name_of is None:
        return None
    name_of.restype = ctypes.c_char_p
    name: bytes = name_of()
    return name.decode("ascii", errors="replace")


def _keep_memory() -> None:
    """Let the C library keep what MLX lets go of; each MLX operation asks for a new array.

    Memory that went back to the system comes again page by page, each filled with 0 first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


@functools.cache
def backend() -> Backend:
    """Load MLX and say what it runs on.

    Returns:
        The backend of this process.

    Raises:
        UserError: no MLX backend is installed; the message names the extra to install.
    """
    blas = load_blas()
    try:
        import mlx.core as mx

        mx.default_device()
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"{_INSTALL_HINT}\n(MLX said: {error})") from error
    own_math = False
    if mx.metal.is_available():
        device = "metal"
    elif mx.default_device() == mx.Device(mx.gpu):
        device = "cuda"
    else:
        device = "cpu"
        # mx.compile needs a C++ compiler at run time here and gains nothing (docs/log.md).
        mx.disable_compile()
        _keep_memory()
        own_math = os.environ.get(MATH_VARIABLE) != "off"
        if own_math:
            from mlx_fd.models import cpu_math

            cpu_math.install()
    return Backend(device, blas, own_math)
