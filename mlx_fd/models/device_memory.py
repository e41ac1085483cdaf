"""How much memory this machine has for MLX, and how much of it a run may keep."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_fd.models.backend import backend

# What MLX may keep of freed buffers for its next arrays, where much is left: beyond it a cache only
# takes memory from other programs.
_LARGEST_CACHE = 8 << 30
_SMALLEST_CACHE = 256 << 20
# How the devices of MLX call what they can hold.
_WORKING_SET = "max_recommended_working_set_size"
# Of a control group: its limit, what is used, and in memory.stat the file cache in that.
_CGROUP_FILES = ("memory.max", "memory.current", "inactive_file")
_OLD_CGROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# What MLX's errors have in them where memory gave out, or the time that a GPU may take.
_GAVE_OUT = (
    *("kIOGPUCommandBuffer", "Command buffer execution failed"),
    *("allocate", "out of memory"),
)


def _cgroup_free(root: Path) -> int | None:
    """Memory that the control groups still allow, or ``None`` where none sets a limit."""
    found = [_free_in(folder, files) for folder, files in _cgroups(root)]
    return min((free for free in found if free is not None), default=None)


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups that this process is in, with their files: its own and those above it.

    Of a batch system or of systemd each job has one, far below the topmost. In a container the
    topmost is the container's own, and the path to it is not there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {kinds: path for _, kinds, path in (line.split(":", 2) for line in lines)}
    old = next((path for kinds, path in paths.items() if "memory" in kinds.split(",")), "/")
    for folder, path, files in (
        (root / "sys/fs/cgroup", paths.get("", "/"), _CGROUP_FILES),
        (root / "sys/fs/cgroup/memory", old, _OLD_CGROUP_FILES),
    ):
        names = [] if ".." in path.split("/") else [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):
            yield folder.joinpath(*names[:depth]), files


def _free_in(folder: Path, files: tuple[str, str, str]) -> int | None:
    limit_file, used_file, cache_key = files
    try:
        limit = int((folder / limit_file).read_text())
        used = int((folder / used_file).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        # Missing, or "max": no limit of this kind.
        return None
    # File cache is given back when memory is needed.
    cached = dict(line.split() for line in stat.splitlines()).get(cache_key, 0)
    return max(0, limit - used + int(cached))


def _linux_available(root: Path = Path("/")) -> int:
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = 1024 * int(meminfo["MemAvailable"].split()[0])
    limit = _cgroup_free(root)
    return available if limit is None else min(available, limit)


def available_memory() -> int:
    """Bytes that MLX can use now.

    Returns:
        Metal: the working set that the system recommends. CUDA: the device's free memory. Else:
        what the machine and its control group have left.
    """
    device = backend().device
    if device != "cpu":
        import mlx.core as mx

        info = mx.device_info()
        for key in (_WORKING_SET, "free_memory", "memory_size"):
            if key in info:
                return int(info[key])
    if sys.platform == "linux":
        return _linux_available()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def what_gave_out(error: RuntimeError | MemoryError) -> str | None:
    """What an error says of memory, or of a GPU's time, that gave out; ``None``: nothing."""
    if isinstance(error, MemoryError):
        return "Python had no more memory"
    text = str(error)
    return text.splitlines()[0] if any(sign in text for sign in _GAVE_OUT) else None


def memory_limits(needed: int, working_set: int) -> tuple[int, int]:
    """What MLX may wire, and what it may keep of freed buffers, in bytes.

    Args:
        needed: what the run needs at most.
        working_set: what the device holds without slowing down.

    Returns:
        The wired limit, the run's need up to the working set; and the cache limit, half of the rest
        within 256 MiB and 8 GiB, so that kept buffers never push out what is in use.
    """
    rest = max(0, working_set - needed) // 2
    return min(needed, working_set), min(max(rest, _SMALLEST_CACHE), _LARGEST_CACHE)


def limit_memory(needed: int) -> tuple[int, int] | None:
    """Set MLX's wired limit and cache limit for a run, where the device has a working set (Metal).

    Args:
        needed: the estimate of what the run needs at most, in bytes.

    Returns:
        The limits of :func:`memory_limits`; ``None`` where MLX has nothing to wire.
    """
    backend()
    import mlx.core as mx

    working_set = mx.device_info().get(_WORKING_SET)
    if working_set is None:
        return None
    wired, cache = memory_limits(needed, int(working_set))
    mx.set_wired_limit(wired)
    mx.set_cache_limit(cache)
    return wired, cache
