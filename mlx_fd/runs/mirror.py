"""A run directory for each rank: the run's own for rank 0, and for the others a copy for a while.

All ranks go through the same lines, which read logs, probe set and checkpoints; what the others
write is theirs and goes with their processes. Rank 0 alone writes checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_fd.errors import UserError
from mlx_fd.models import ranks
from mlx_fd.runs.directory import BEGUN, CHECKPOINTS, WARM_UP, read_manifest


@contextlib.contextmanager
def own_folder(folder: Path, *, new: bool) -> Iterator[Path]:
    """The folder that this rank uses as the run directory, after it has met the others.

    Args:
        folder: the run directory, which only rank 0 need have.
        new: the run begins: there is nothing to copy.

    Raises:
        UserError: the others cannot be reached; or the run was begun by another number of ranks.
    """
    ranks.join()
    if not new:
        ranks.together(lambda: _check_ranks(folder))
    if ranks.processes() == 1:
        yield folder
        return
    content = b"" if new else ranks.from_first(lambda: _packed(folder))
    if ranks.first():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-fd-rank-") as scratch:
        copy = Path(scratch, "run")
        if not new:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(copy, filter="data")
        yield copy


def copy_from_first(path: Path) -> None:
    """Put a file that rank 0 has written in the run directory at the same place of all copies."""
    if ranks.processes() == 1:
        return
    content = ranks.from_first(path.read_bytes)
    if not ranks.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _check_ranks(folder: Path) -> None:
    """Make sure that a run goes on with as many ranks as it began with; asked on rank 0 alone."""
    if not ranks.first():
        return
    began, here = read_manifest(folder).get("ranks", 1), ranks.processes()
    if began != here:
        start = f"mlx.launch -n {began} mlx-fd resume" if began > 1 else "mlx-fd resume"
        raise UserError(
            f"{folder}: the run began with {began} process{'es' * (began > 1)}, and here are "
            f"{here}: its draws and shares depend on their number. Go on with: {start} "
            f"{shlex.quote(str(folder))}"
        )


def _packed(folder: Path) -> bytes:
    """What a resume reads of a run directory, as a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            is_file = path.is_file() and not path.is_symlink()
            if is_file or path.name in (CHECKPOINTS, BEGUN, WARM_UP):
                archive.add(path, path.name)
    return packed.getvalue()
