"""The run directory: what is written, in which order, and how a run finds its way back.

Nothing is ever half there. A file is written under a temporary name, flushed to the disk and then
renamed; a checkpoint is a folder renamed into place whole, with the digest of each of its files in
``state.json``. The logs only grow, and a checkpoint knows how long they were, so a run that was
killed at any moment goes back to the newest good checkpoint and cuts the logs to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import (
    check_way,
    clear_unfinished,
    digest_of,
    open_in_place,
    open_to_read,
    point,
    read_text,
    remove,
    share,
    subfolder,
    sync_file,
    sync_folder,
    truncate,
    working_folder,
    write_atomic,
    write_json,
)
from mlx_fd.marks import MARK, RUN, check_free, read_mark, write_mark

CONFIG = "config.toml"
MANIFEST = "manifest.json"
EPISODES = "episodes.jsonl"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ATTEMPTS = "attempts.jsonl"
HEADROOM = "headroom.json"
LOGS = (EPISODES, METRICS, SAMPLES, ATTEMPTS)
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
TEACHER = "teacher"
STATE = "state.json"
_LOCK = ".lock"
# Says where the base model is; a user may point it elsewhere.
_EDITABLE = ("adapter_config.json",)

README = """\
# A run of mlx-fd

| file | what it is |
|---|---|
| `config.toml` | every option of the run; `mlx-fd loop --config config.toml` runs it again |
| `manifest.json` | versions, seed, models and data with their digests |
| `episodes.jsonl` | one line per problem: answer, both feedbacks, the gate, the final answer |
| `metrics.jsonl` | one line per batch: losses, weights, the gate's reasons, the probe set |
| `samples.jsonl` | with `epochs` > 1: the tokens of each text that the student learned from |
| `teacher/` | with `teacher_top_k`: what the expert said about texts |
| `checkpoints/` | `NNNNNN` by batch; `last` and `best` (on the probe set) point to them |
| `probe.json` | the held-out problems that the gate watches, their arrays beside it |
| `exam_*.json` | what the student made of each question of the examination, where there was one |
| `summary.json` | the run's totals, written at its end |
| `pareto.*` | with `mlx-fd pareto`: where to stop next time; `sweep/` has the runs that try it |
| `eval/` | with `mlx-fd eval`: `eval.json` and `outputs.jsonl` of each evaluation |
| `report.html` | the page of `mlx-fd report .` |
| `tracking.json` | with `--track`: what each tracker has of the run |

    mlx-fd resume .                       # goes on where it stopped
    mlx-fd report .                       # makes report.html
    mlx-fd feedback . --problem TEXT --answer TEXT
    mlx_lm.generate --model MODEL --adapter-path checkpoints/best --prompt TEXT

MODEL is the student's, named in `manifest.json`.
"""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a half-written last line is left out.

    Raises:
        UserError: there is a pipe or a device in its place.
    """
    if not path.exists():
        return []
    with open_to_read(path) as file:
        text = file.read().decode("utf-8", errors="replace")
    rows = []
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def create(folder: Path, config_toml: str, manifest: dict[str, Any], readme: str = README) -> None:
    """Make a run directory.

    Args:
        folder: where; it is made.
        config_toml: the configuration.
        manifest: what the run is made of.
        readme: what explains the files.

    Raises:
        UserError: there is something in it already, or it cannot be written.
    """
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_mark(folder, RUN)
    subfolder(folder, CHECKPOINTS)
    write_atomic(folder / "README.md", readme)
    write_atomic(folder / CONFIG, config_toml)
    # Last: a folder with a manifest is a run.
    write_json(folder / MANIFEST, manifest)


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run; whether they are ours, :func:`is_ours` says."""
    return (folder / MANIFEST).is_file() and (folder / CONFIG).is_file()


def is_ours(folder: Path) -> bool:
    """Whether a folder is a run's, begun or done: its mark says so, or what its manifest says."""
    if read_mark(folder).get("kind") == RUN:
        return True
    if not is_run(folder):
        return False
    try:
        return _is_manifest(json.loads(read_text(folder / MANIFEST)))
    except (OSError, ValueError, RecursionError):
        return False


def _is_manifest(content: Any) -> bool:
    """Whether it is of mlx-fd; runs of earlier versions have no other mark."""
    versions = content.get("versions") if isinstance(content, dict) else None
    return isinstance(versions, dict) and "mlx-fd" in versions


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run's manifest.

    Raises:
        UserError: the folder holds no run, or the manifest cannot be read.
    """
    if not is_run(folder):
        raise UserError(
            f"{folder}: this is no run directory (it has no {MANIFEST}). "
            "Name the folder that `mlx-fd loop` or `mlx-fd self-distill` printed when it began."
        )
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read: {error}") from error
    if not is_ours(folder):
        raise UserError(
            f"{folder}: this is no run directory of mlx-fd (neither its {MANIFEST} nor a file "
            f"{MARK} says so), and it was left alone"
        )
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory, which is marked as one, so that no other process writes it.

    The lock goes with the process, however that ends.

    Raises:
        UserError: another process holds it, it is not a run's, or it cannot be written.
    """
    if not is_ours(folder):
        check_free(folder, RUN)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_mark(folder, RUN)
            lock = open_in_place(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another mlx-fd process is writing this run; wait for it or stop it."
            ) from error
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}).") from error
        yield


def failed_write(error: OSError | RuntimeError) -> str | None:
    """Why a write failed, in words; ``None`` where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # MLX reports a failed write of weights this way, and only this way.
    said = str(error).lower()
    return str(error) if "write" in said or "open" in said else None


@contextlib.contextmanager
def explained(folder: Path, advice: str = "") -> Iterator[None]:
    """Turn a failed write into a message that says that nothing is lost.

    Args:
        folder: what is written.
        advice: what to do; empty where ``folder`` is a run, which can be gone on with.
    """
    advice = advice or f"free some space, then: mlx-fd resume {shlex.quote(str(folder))}"
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (why := failed_write(error)) is None:
            raise
        raise _cannot_write(folder, why, advice) from error


def _cannot_write(folder: Path, why: str, advice: str) -> UserError:
    return UserError(
        f"{folder}: cannot be written ({why}). What was saved before is whole; {advice}"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and the ``state.json`` in it."""

    folder: Path
    state: dict[str, Any]

    @property
    def batch(self) -> int:
        """Batches of problems that were done when it was written."""
        return int(self.state["batch"])


def save_checkpoint(
    folder: Path,
    batch: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    *,
    best: int,
    keep: int,
) -> None:
    """Write a checkpoint, point ``last`` and ``best`` to the right ones, and drop old ones.

    Args:
        folder: the run directory.
        batch: batches done; the checkpoint's name.
        write: writes the weights into the folder it is given.
        state: everything else that a resumed run needs; the files' digests are added.
        best: the batch whose checkpoint is the best so far.
        keep: how many of the newest to keep beside the best.
    """
    checkpoints = subfolder(folder, CHECKPOINTS)
    final = checkpoints / f"{batch:06d}"
    with working_folder(checkpoints) as temporary, working_folder(checkpoints) as former:
        write(temporary)
        files = sorted(temporary.iterdir())
        for path in files:
            sync_file(path)
        digests = {path.name: digest_of(path) for path in files if path.name not in _EDITABLE}
        write_json(temporary / STATE, {"batch": batch, **state, "files": digests})
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
        with contextlib.suppress(OSError, ValueError, KeyError):
            needed.add(f"{json.loads((path / STATE).read_text())['best_batch']:06d}")
    for old in _numbered(checkpoints):
        if old.name not in needed:
            remove(old)


def _numbered(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in checkpoints.iterdir() if p.name.isdigit()), reverse=True)


def _read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or ``None`` where a file is missing or not what was written.

    A file that is there and cannot be read (permissions, a failing disk) is another matter: that
    error goes through, and nothing is given up for it.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        whole = all(digest_of(folder / name) == value for name, value in state["files"].items())
        return Checkpoint(folder, state) if whole and state["batch"] >= 0 else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def checkpoint_after(folder: Path, batch: int) -> Checkpoint | None:
    """A run's checkpoint after so many batches; ``None`` where there is none that is whole."""
    return _read_checkpoint(folder / CHECKPOINTS / f"{batch:06d}")


def log_size(folder: Path, name: str) -> int:
    """A log's size in bytes; 0 where it is not begun."""
    path = folder / name
    return path.stat().st_size if path.exists() else 0


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole and whose logs are there, changing nothing.

    Returns:
        The checkpoint (``None`` where the run has not come to one), and why newer ones are
        passed over.

    Raises:
        UserError: there are checkpoints, and none of them will do.
    """
    checkpoints = folder / CHECKPOINTS
    passed_over = []
    for candidate in _numbered(checkpoints) if checkpoints.is_dir() else []:
        checkpoint = _read_checkpoint(candidate)
        if checkpoint is None:
            passed_over.append(f"checkpoint {candidate.name} is not whole")
            continue
        sizes = checkpoint.state["log_bytes"]
        short = [name for name, size in sizes.items() if log_size(folder, name) < size]
        if not short:
            return checkpoint, passed_over
        passed_over.append(f"{short[0]} has lost lines that checkpoint {candidate.name} knew")
    if passed_over:
        raise UserError(
            f"{folder}: no checkpoint can be gone back to: {'; '.join(passed_over)}. Something "
            "else changed these files; bring them back, or begin a new run."
        )
    return None, passed_over


def roll_back(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Bring a run directory to where a checkpoint of :func:`newest_checkpoint` left it.

    Logs are cut to their length then. Newer checkpoints, which are not whole, are put aside under
    another name; half-written files go.
    """
    checkpoints = subfolder(folder, CHECKPOINTS)
    check_way(folder, TEACHER)
    sizes = checkpoint.state["log_bytes"] if checkpoint else {}
    for name in LOGS:
        if os.path.lexists(folder / name):
            # Now, and not after a batch of work.
            os.close(open_in_place(folder / name, os.O_WRONLY))
        if log_size(folder, name) > sizes.get(name, 0):
            truncate(folder / name, sizes.get(name, 0))
    batch = checkpoint.batch if checkpoint else -1
    for path in checkpoints.iterdir():
        if path.name.isdigit() and int(path.name) > batch:
            aside = path.with_name(f"{path.name}.broken")
            remove(aside)
            path.rename(aside)
    if checkpoint is not None:
        point(checkpoints / "last", checkpoint.folder.name)
        point(checkpoints / "best", f"{checkpoint.state['best_batch']:06d}")
    for where in (folder, checkpoints, folder / TEACHER):
        clear_unfinished(where)
    (folder / SUMMARY).unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Make sure that a run can be made in a folder: it is empty, or a run was only begun there.

    Raises:
        UserError: there is a run in it, or something else.
    """
    if is_run(folder) and is_ours(folder):
        raise UserError(
            f"{folder}: this is a run already; go on with: mlx-fd resume {shlex.quote(str(folder))}"
        )
    check_free(folder, RUN)
