"""What this machine has for MLX, and the limits that a run sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_fd.models import device_memory
from mlx_fd.models.backend import backend
from mlx_fd.models.device_memory import limit_memory, memory_limits

GIB = 1 << 30


def test_linux_memory_and_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:       24684084 kB\nMemAvailable:   8388608 kB\nHugePages_Total:   0\n"
    )
    assert device_memory._linux_available(tmp_path) == 8 * GIB
    new = tmp_path / "sys/fs/cgroup"
    new.mkdir(parents=True)
    (new / "memory.current").write_text(f"{3 * GIB}\n")
    (new / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    (new / "memory.max").write_text("max\n")
    assert device_memory._linux_available(tmp_path) == 8 * GIB
    (new / "memory.max").write_text(f"{6 * GIB}\n")
    assert device_memory._linux_available(tmp_path) == 4 * GIB
    (new / "memory.max").write_text(f"{60 * GIB}\n")
    assert device_memory._linux_available(tmp_path) == 8 * GIB
    (new / "memory.max").unlink()
    old = new / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (old / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (old / "memory.stat").write_text(f"total_inactive_file {GIB // 2}\n")
    assert device_memory._linux_available(tmp_path) == GIB * 3 // 2


@pytest.mark.parametrize(
    ("lines", "group", "limits", "free"),
    [
        # Of a job of SLURM; and the limit of a group above it.
        ("0::/slurm/job_7/step", "slurm/job_7/step", {"slurm/job_7/step": 3}, 2),
        ("0::/slurm/job_7/step", "slurm/job_7/step", {"slurm/job_7": 4, "slurm": 6}, 3),
        ("4:cpu,memory:/jobs/a:b\n0::/", "memory/jobs/a:b", {"memory/jobs/a:b": 5}, 4),
        # In a container the path is the host's; the topmost group here is the container's.
        ("0::/docker/1f", "", {"": 3}, 2),
        ("0::/../../user", "", {"": 3}, 2),
        ("0::/session", "session", {}, 8),
    ],
)
def test_the_limit_of_a_group_far_below_counts(
    lines: str, group: str, limits: dict[str, int], free: int, tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable:   8388608 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{lines}\n")
    top = tmp_path / "sys/fs/cgroup"
    (top / group).mkdir(parents=True)
    for name, limit in limits.items():
        old = name.startswith("memory")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ()
        for file, size in zip(files or ("memory.max", "memory.current"), (limit, 1), strict=True):
            (top / name / file).write_text(f"{size * GIB}\n")
        (top / name / "memory.stat").write_text("anon 5\n")
    assert device_memory._linux_available(tmp_path) == free * GIB


def test_available_memory_is_plausible() -> None:
    assert 1 << 27 < device_memory.available_memory() < 1 << 45


@pytest.mark.parametrize(
    ("needed", "wired", "cache"),
    [
        # Half of what the run leaves, but never so little that every array is allocated anew.
        (4, 4 * GIB, 6 * GIB),
        (14, 14 * GIB, GIB),
        (15.9, int(15.9 * GIB), 256 << 20),
        (40, 16 * GIB, 256 << 20),
        (0, 0, 8 * GIB),
    ],
)
def test_limits_leave_the_working_set_to_the_run(needed: float, wired: int, cache: int) -> None:
    assert memory_limits(int(needed * GIB), 16 * GIB) == (wired, cache)


def test_nothing_is_limited_where_nothing_is_wired() -> None:
    import mlx.core as mx

    backend()
    limits = limit_memory(GIB)
    known = "max_recommended_working_set_size" in mx.device_info()
    assert (limits is not None) == known
