"""The checkpoints of a run, and how a run that was stopped goes back to one.

A checkpoint is a folder renamed into place whole. Its ``state.json`` has the digest of each file in
it and of itself, and how long the logs were, with their digests: a run that was killed at any
moment goes back to the newest checkpoint that is whole and whose logs are as they were.

After a kill the logs may have some lines more: those of the batches since the checkpoint. They are
cut, and made again. What a kill cannot leave, lines of more batches than come between checkpoints,
says that checkpoints were lost, and then nothing is cut unless the user says so. What is cut is
kept beside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.files import (
    check_way,
    clear_unfinished,
    digest_of,
    open_in_place,
    open_to_read,
    point,
    remove,
    share,
    subfolder,
    sync_file,
    sync_folder,
    working_folder,
    write_json,
    write_with,
)
from mlx_fd.models.directory import ADAPTER_CONFIG
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.logs import Log, count_lines, log_size

REDO = "--redo-from-checkpoint"
# Of each such file, the entry that says where the base model is: a user may point it elsewhere.
_EDITABLE = {ADAPTER_CONFIG: "model"}
_TAIL = "tail"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: where it is.
        state: its ``state.json``.
        logs: the run's logs, as far as they were when it was written.
        vouched: whether digests vouch for state and logs; older versions wrote none.
        best_lost: whether the weights that were the best until then are not whole any more.
    """

    folder: Path
    state: dict[str, Any]
    logs: Mapping[str, Log]
    vouched: bool
    best_lost: bool = False

    @property
    def batch(self) -> int:
        """Batches of problems that were done when it was written."""
        return int(self.state["batch"])


def save_checkpoint(
    folder: Path,
    batch: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    logs: Mapping[str, Log],
    *,
    best: int,
    keep: int,
) -> None:
    """Write a checkpoint, point ``last`` and ``best`` to the right ones, and drop old ones.

    Args:
        folder: the run directory.
        batch: batches done; the checkpoint's name.
        write: writes the weights into the folder it is given.
        state: everything else that a resumed run needs; the digests are added.
        logs: the run's logs by their files' names.
        best: the batch whose checkpoint is the best so far.
        keep: how many of the newest to keep beside the best.
    """
    checkpoints = subfolder(folder, runs.CHECKPOINTS)
    final = checkpoints / f"{batch:06d}"
    with working_folder(checkpoints) as temporary, working_folder(checkpoints) as former:
        write(temporary)
        files = sorted(temporary.iterdir())
        for path in files:
            sync_file(path)
        digests = {path.name: digest_of(path) for path in files if path.name not in _EDITABLE}
        editable = {
            path.name: json.loads(path.read_text(encoding="utf-8"))
            for path in files
            if path.name in _EDITABLE
        }
        whole = {
            "batch": batch,
            **state,
            "files": digests,
            "editable": editable,
            "log_bytes": {name: log.size for name, log in logs.items()},
            "log_sha256": {name: log.sha256 for name, log in logs.items()},
        }
        write_json(temporary / runs.STATE, with_digest(whole))
        share(temporary)
        if os.path.lexists(final):
            final.rename(former / final.name)
        temporary.rename(final)
        sync_folder(checkpoints)
        point(checkpoints / "last", final.name)
        point(checkpoints / "best", f"{best:06d}")
    # A kept checkpoint may be gone back to, and then its own best must still be there.
    kept = _numbered(checkpoints)[:keep]
    needed = {final.name, f"{best:06d}", *(path.name for path in kept)}
    for path in kept:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            needed.add(f"{read_checked(path / runs.STATE)[0]['best_batch']:06d}")
    for old in _numbered(checkpoints):
        if old.name not in needed:
            remove(old)


def _numbered(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not checkpoints.is_dir():
        return []
    return sorted((p for p in checkpoints.iterdir() if p.name.isdigit()), reverse=True)


def _read_state(folder: Path) -> tuple[dict[str, Any], bool] | None:
    """The state of the checkpoint in a folder, and whether digests vouch for it and its logs.

    ``None`` where a file is missing or not what was written. A file that is there and cannot be
    read (permissions, a failing disk) is another matter: that error goes through, and nothing is
    given up for it.
    """
    try:
        state, digested = read_checked(folder / runs.STATE)
        # An older version wrote no digests at all: one alone was not taken away by it.
        if digested != ("log_sha256" in state) or state["batch"] < 0:
            return None
        files = state["files"].items()
        whole = all(digest_of(folder / name) == value for name, value in files)
        return (state, digested) if whole else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def checkpoint_after(folder: Path, batch: int) -> Path | None:
    """The checkpoint after so many batches; ``None`` where there is none that is whole."""
    checkpoint = folder / runs.CHECKPOINTS / f"{batch:06d}"
    return checkpoint if _read_state(checkpoint) else None


def check_weights(checkpoint: Path, names: Sequence[str]) -> None:
    """Make sure that weights of a checkpoint are those that the run wrote, where that can be said.

    Args:
        checkpoint: its folder.
        names: of the files that are to be used.

    Raises:
        UserError: one was changed, or the checkpoint's state was.
    """
    try:
        state, _ = read_checked(checkpoint / runs.STATE)
        digests = dict(state["files"])
    except FileNotFoundError:
        return
    except (OSError, ChangedFile, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint / runs.STATE}: cannot be read ({error}), so that nothing says that the "
            "weights beside it are whole; take another checkpoint."
        ) from error
    for name in names:
        path = checkpoint / name
        if name in digests and path.exists() and digest_of(path) != digests[name]:
            raise UserError(
                f"{path}: it was changed after the run wrote it; restore the old file, or "
                "take another checkpoint."
            )


def _logs_at(folder: Path, state: Mapping[str, Any], name: str) -> dict[str, Log] | str:
    """The logs as a checkpoint knew them, or what is wrong with them."""
    found = {}
    for log_name in runs.LOGS:
        log = Log.read(folder / log_name, int(state["log_bytes"].get(log_name, 0)))
        if log is None:
            return f"{log_name} has lost lines that checkpoint {name} knew"
        if "log_sha256" in state and state["log_sha256"][log_name] != log.sha256:
            return f"{log_name} is not what checkpoint {name} knew: something changed it"
        found[log_name] = log
    return found


def changed_logs(folder: Path) -> list[str]:
    """The logs that are not what the run's newest checkpoint knew, where that can be said."""
    for checkpoint in _numbered(folder / runs.CHECKPOINTS):
        try:
            state, digested = read_checked(checkpoint / runs.STATE)
        except (OSError, ChangedFile):
            continue
        if not digested:
            return []
        return [
            name
            for name, size in state["log_bytes"].items()
            if not _is_as_written(folder / name, size, state["log_sha256"][name])
        ]
    return []


def _is_as_written(path: Path, size: int, sha256: str) -> bool:
    try:
        log = Log.read(path, size)
    except (OSError, UserError):
        return False
    return log is not None and log.sha256 == sha256


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole and whose logs are, changing nothing.

    One whose best weights so far are whole, too, goes before a newer one.

    Returns:
        The checkpoint (``None`` where there is none that will do), and why others are passed over.
    """
    passed_over: list[str] = []
    without_best: tuple[Checkpoint, int] | None = None
    for candidate in _numbered(folder / runs.CHECKPOINTS):
        name = candidate.name
        read = _read_state(candidate)
        if read is None:
            passed_over.append(f"checkpoint {name} is not whole")
            continue
        state, digested = read
        logs = _logs_at(folder, state, name)
        if isinstance(logs, str):
            passed_over.append(logs)
            continue
        checkpoint = Checkpoint(candidate, state, logs, digested)
        if checkpoint_after(folder, state["best_batch"]) is not None:
            return checkpoint, passed_over
        if without_best is None:
            lost = Checkpoint(candidate, state, logs, digested, best_lost=True)
            without_best = lost, len(passed_over)
        passed_over.append(f"of checkpoint {name} the best weights so far are not whole")
    if without_best is not None:
        return without_best[0], passed_over[: without_best[1]]
    return None, passed_over


def check_nothing_lost(folder: Path, every: int) -> tuple[Checkpoint | None, list[str]]:
    """Make sure that going back to the newest good checkpoint cuts no more than a kill leaves.

    Batches of damaged checkpoints that are there are made again, unless the run is finished.

    Args:
        folder: the run directory.
        every: batches between two checkpoints.

    Returns:
        As :func:`newest_checkpoint`.

    Raises:
        UserError: more would be cut; the message says what is there, what is not, and what to do.
    """
    checkpoint, passed_over = newest_checkpoint(folder)
    numbers = [int(path.name) for path in _numbered(folder / runs.CHECKPOINTS)]
    lines = count_lines(folder / runs.METRICS)
    finished = (folder / runs.SUMMARY).exists()
    # What it says of itself was true when it was written; the configuration may have changed.
    allowed = max(every, int(checkpoint.state.get("checkpoint_every", 0)) if checkpoint else 0)
    there = f"its logs have {lines} batches"
    if finished:
        there, allowed = f"the run is finished ({runs.SUMMARY} is there), {there}", 0
    begun = finished or any(log_size(folder / name) for name in runs.LOGS)
    if not numbers and begun:
        why = f"there are no checkpoints in {runs.CHECKPOINTS}/"
    elif numbers and checkpoint is None:
        why = f"no checkpoint can be gone back to: {'; '.join(passed_over)}"
    elif numbers and lines - max(numbers) > allowed:
        why = f"the newest checkpoint is that after batch {max(numbers)}: checkpoints are missing"
    elif finished and passed_over:
        why = "; ".join(passed_over)
    else:
        return checkpoint, passed_over
    command = f"mlx-fd resume {shlex.quote(str(folder))} {REDO}"
    again = f"from batch {checkpoint.batch} on" if checkpoint else "from its beginning"
    raise UserError(
        f"{folder}: {there} and {why}. Nothing was changed. Restore the files, or "
        f"let the run be done again {again}, what is there being kept under {runs.CUT}/, with: "
        f"{command}"
    )


def roll_back(
    folder: Path, checkpoint: Checkpoint | None, cut: Path, *, ordinary: bool
) -> list[str]:
    """Bring a run directory to where a checkpoint of :func:`newest_checkpoint` left it.

    Logs are cut to their length then, newer checkpoints are moved away, half-written files go.

    Args:
        folder: the run directory.
        checkpoint: where to; ``None``: to before the first.
        cut: of :func:`mlx_fd.runs.directory.cut_folder`, for what is cut.
        ordinary: whether a kill alone explains what is cut. It is made again the same, and is kept
            until the next such cut; all else is kept for good.

    Returns:
        What was put right, in sentences.
    """
    checkpoints = subfolder(folder, runs.CHECKPOINTS)
    check_way(folder, runs.TEACHER)
    said: list[str] = []
    for name in runs.LOGS:
        if os.path.lexists(folder / name):
            # Now, and not after a batch of work.
            os.close(open_in_place(folder / name, os.O_WRONLY))
        log = checkpoint.logs[name] if checkpoint else Log(folder / name)
        if log_size(log.path) > log.size:
            _keep_tail(log, cut.with_name(_TAIL) if ordinary else cut)
            log.cut()
    for name in ("last", "best"):
        if (link := checkpoints / name).is_dir() and not link.is_symlink():
            runs.set_aside(link, cut)
            said.append(
                f"{runs.CHECKPOINTS}/{name} was a folder, as in a copy that followed links, and is "
                f"a link again; the folder is in {runs.CUT}/{cut.name}"
            )
    batch = checkpoint.batch if checkpoint else -1
    for path in checkpoints.iterdir():
        if path.name.isdigit() and int(path.name) > batch:
            runs.set_aside(path, cut)
    if checkpoint is not None:
        best = f"{checkpoint.state['best_batch']:06d}"
        point(checkpoints / "last", checkpoint.folder.name)
        point(checkpoints / "best", best)
        for one in sorted({checkpoint.folder, checkpoints / best}):
            said += _put_right(one, cut)
    for where in (folder, checkpoints, folder / runs.TEACHER):
        clear_unfinished(where)
    return said


def _keep_tail(log: Log, to: Path) -> None:
    """Copy what a log has after its known bytes into a folder."""
    to.mkdir(parents=True, exist_ok=True)

    def copy(temporary: Path) -> None:
        with open_to_read(log.path) as source, temporary.open("wb") as file:
            source.seek(log.size)
            shutil.copyfileobj(source, file)

    write_with(to / log.path.name, copy)


def _put_right(checkpoint: Path, cut: Path) -> list[str]:
    """Write a checkpoint's editable files again where more was changed than may be."""
    said: list[str] = []
    read = _read_state(checkpoint)
    if read is None:
        return said
    for name, written in read[0].get("editable", {}).items():
        path, editable = checkpoint / name, _EDITABLE[name]
        try:
            found = read_checked(path)[0]
            pointed_to = found[editable]
            if {**found, editable: None} == {**written, editable: None}:
                continue
        except (OSError, ChangedFile, KeyError, TypeError):
            pointed_to = written[editable]
        if path.exists():
            runs.set_aside(path, cut, f"{checkpoint.name}-{name}")
        if not isinstance(pointed_to, str):
            pointed_to = written[editable]
        write_json(path, {**written, editable: pointed_to})
        said.append(
            f"{runs.CHECKPOINTS}/{checkpoint.name}/{name} was not what the run wrote there, and is "
            f'again; only its "{editable}" may be changed'
        )
    return said
