"""The run directory: what is written, in which order, and how a run finds its way back.

Nothing is ever half there. A file is written under a temporary name, flushed to the disk and then
renamed; what is read back carries a digest. The checkpoints are :mod:`mlx_fd.runs.checkpoints`, the
logs :mod:`mlx_fd.runs.logs`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mlx_fd.errors import UserError
from mlx_fd.files import (
    failed_write,
    open_in_place,
    open_to_read,
    read_text,
    subfolder,
    sync_folder,
    working_folder,
    write_atomic,
    write_json,
)
from mlx_fd.runs.checked import DIGEST, ChangedFile, read_checked, with_digest
from mlx_fd.runs.marks import MARK, RUN, check_free, read_mark, write_mark
from mlx_fd.runs.records.episodes import EpisodeRow, LoggedSampleRow
from mlx_fd.runs.records.manifest import SCHEMA_VERSION, Manifest
from mlx_fd.runs.records.metrics import MetricsRow
from mlx_fd.runs.records.self_distillation import AttemptRow, SelfMetricsRow

CONFIG = "config.toml"
MANIFEST = "manifest.json"
QUESTIONS = "questions.txt"
EPISODES = "episodes.jsonl"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ATTEMPTS = "attempts.jsonl"
HEADROOM = "headroom.json"
EXAM = "exam_before.json"
EXAM_AFTER = "exam_after.json"
LOGS = (EPISODES, METRICS, SAMPLES, ATTEMPTS)
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
CUT = "cut"
WARM_UP = "warm_up"
PROBE = "probe.json"
BEGUN = "begun"
TEACHER = "teacher"
STATE = "state.json"
# What a run leaves, and nothing that it writes before its manifest.
_WORK = (*LOGS, PROBE, HEADROOM, EXAM, EXAM_AFTER, SUMMARY, WARM_UP)
_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

README = """\
# A run of mlx-fd

| file | what it is |
|---|---|
| `config.toml` | all options of the run; `mlx-fd loop --config config.toml` repeats it |
| `manifest.json` | versions, seed, models and data with their digests |
| `questions.txt` | SHA-256 of each question that the student learns from, in earlier runs too |
| `episodes.jsonl` | one line per problem: answer, both feedbacks, the gate, the final answer |
| `metrics.jsonl` | one line per batch: losses, weights, gate decisions, probe evaluations |
| `samples.jsonl` | the tokens of each training sample |
| `teacher/` | with `teacher_top_k`: the cache of the expert's top k tokens |
| `begun/` | with `--continue`: adapter and heads that the student began with |
| `checkpoints/` | `NNNNNN` by batch; `last` and `best` (on the probe set) point to them |
| `probe.json` | the held-out problems of the gate; their arrays are in `probe.safetensors` |
| `warm_up/` | with `warm_up`: the run of `mlx-fd distil` that the student comes from |
| `exam_*.json` | with an exam: the student's result on each question |
| `summary.json` | the run's totals, written at its end |
| `cut/` | what `resume` removed: `tail/` after the last stop; everything else by date |
| `pareto.*` | with `mlx-fd pareto`: where to stop next time; `sweep/`: a run per threshold |
| `cascade.*` | with `mlx-fd cascade`: when the student passes on to the expert |
| `eval/` | with `mlx-fd eval`: `eval.json` and `outputs.jsonl` of each evaluation |
| `report.html` | the report of `mlx-fd report .` |
| `tracking.json` | with `--track`: the batches that each tracker has received |

    mlx-fd resume .                       # continue a stopped run
    mlx-fd report .                       # write report.html
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


def read_episodes(folder: Path) -> list[EpisodeRow]:
    """The rows of a run's ``episodes.jsonl``; raises as :func:`read_lines`."""
    return cast(list[EpisodeRow], read_lines(folder / EPISODES))


def read_metrics(folder: Path) -> list[MetricsRow]:
    """The rows of ``metrics.jsonl`` of a run of the loop; raises as :func:`read_lines`."""
    return cast(list[MetricsRow], read_lines(folder / METRICS))


def read_samples(folder: Path) -> list[LoggedSampleRow]:
    """The rows of a run's ``samples.jsonl``; raises as :func:`read_lines`."""
    return cast(list[LoggedSampleRow], read_lines(folder / SAMPLES))


def read_attempts(folder: Path) -> list[AttemptRow]:
    """The rows of a run's ``attempts.jsonl``; raises as :func:`read_lines`."""
    return cast(list[AttemptRow], read_lines(folder / ATTEMPTS))


def read_self_metrics(folder: Path) -> list[SelfMetricsRow]:
    """The rows of ``metrics.jsonl`` of self-distillation; raises as :func:`read_lines`."""
    return cast(list[SelfMetricsRow], read_lines(folder / METRICS))


def check_schema(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make sure that a run's rows have the keys that this version reads.

    Args:
        folder: the run directory.
        manifest: its ``manifest.json``.

    Raises:
        UserError: another version wrote them.
    """
    found = manifest.get("schema_version")
    if found == SCHEMA_VERSION:
        return
    versions = manifest.get("versions")
    version = versions.get("mlx-fd") if isinstance(versions, dict) else None
    named = f"mlx-fd {version}" if isinstance(version, str) else "another mlx-fd"
    kind = "older" if found is None else "other"
    raise UserError(
        f"{folder / MANIFEST}: this run was made by an {kind} version ({named}), whose rows have "
        "other names; begin a new run, or use that version."
    )


def create(
    folder: Path,
    config_toml: str,
    manifest: Manifest,
    readme: str = README,
    questions: Iterable[str] = (),
) -> None:
    """Make a run directory.

    Args:
        folder: where; it is made.
        config_toml: the configuration.
        manifest: what the run is made of.
        readme: what explains the files.
        questions: digests of those that the student learns from; none: its logs will tell.

    Raises:
        UserError: there is something in it already, or it cannot be written.
    """
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_mark(folder, RUN)
    subfolder(folder, CHECKPOINTS)
    _check_links(folder)
    write_atomic(folder / "README.md", readme)
    if lines := "".join(f"{one}\n" for one in sorted(questions)):
        write_atomic(folder / QUESTIONS, lines)
    write_atomic(folder / CONFIG, config_toml)
    # Last: a folder with a manifest is a run.
    write_json(folder / MANIFEST, with_digest(manifest))


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run; whether they are ours, :func:`is_ours` says."""
    return (folder / MANIFEST).is_file() and (folder / CONFIG).is_file()


def _check_links(folder: Path) -> None:
    """Make sure that a folder can hold links, before hours of work: the checkpoints have two.

    Raises:
        UserError: it cannot.
    """
    with working_folder(folder) as working:
        try:
            (working / "link").symlink_to(CHECKPOINTS)
        except OSError as error:
            raise UserError(
                f"{folder}: no symbolic link can be made there ({error.strerror}), as on a disk in "
                f"exFAT, and {CHECKPOINTS}/ needs two; choose another --out"
            ) from error


def _missing(folder: Path) -> str:
    """The names of the files without which a folder is no run."""
    return " and no ".join(name for name in (MANIFEST, CONFIG) if not (folder / name).is_file())


def _work_in(folder: Path) -> str | None:
    """The name of something that a run made in a folder; ``None`` where none was made there."""
    left = [name for name in _WORK if os.path.lexists(folder / name)]
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir():
        left += [f"{CHECKPOINTS}/{p.name}" for p in checkpoints.iterdir() if p.name.isdigit()]
    return left[0] if left else None


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


def read_manifest(folder: Path) -> Manifest:
    """A run's manifest.

    Raises:
        UserError: the folder holds no run, the manifest cannot be read, or another version of
            mlx-fd made the run.
    """
    if not is_run(folder):
        raise UserError(
            f"{folder}: this is not a run directory (it has no {_missing(folder)}). "
            "Name the folder that `mlx-fd loop` or `mlx-fd self-distill` printed when it began."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read: {error}") from error
    if not is_ours(folder):
        raise UserError(
            f"{folder}: this is not a run directory of mlx-fd (neither its {MANIFEST} nor a file "
            f"{MARK} says so), and it was left alone"
        )
    if not isinstance(manifest, dict):
        raise UserError(f"{folder / MANIFEST}: cannot be read: it is no JSON object")
    check_schema(folder, manifest)
    manifest.pop(DIGEST, None)
    return cast(Manifest, manifest)


def manifest_fault(folder: Path) -> str | None:
    """What is to be said of a manifest that is not what was written; ``None`` where it is.

    A digit changed in it costs no run: all in it that decides one is compared with what is here.
    """
    try:
        _, digested = read_checked(folder / MANIFEST)
        fault = "" if digested else "its digest is missing"
    except ChangedFile as error:
        fault = str(error)
    if not fault:
        return None
    return (
        f"{MANIFEST}: {fault}; what decides the run in it is the same as here, and the run goes on"
    )


def cut_folder(folder: Path) -> Path:
    """A folder of a run, named by the time, for what is cut from it; not made yet.

    Raises:
        UserError: ``cut`` leads out of the run directory.
    """
    cut = folder / CUT
    if cut.is_symlink():
        raise UserError(f"{cut}: this is a link, and nothing is moved through one; delete it.")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    found, number = cut / stamp, 1
    while found.exists():
        number += 1
        found = cut / f"{stamp}-{number}"
    return found


def set_aside(path: Path, to: Path, name: str = "") -> None:
    """Move a file or folder of a run where nothing reads it and nothing deletes it.

    Args:
        path: what is to go.
        to: of :func:`cut_folder`.
        name: its name there, where that is another one.
    """
    to.mkdir(parents=True, exist_ok=True)
    path.rename(to / (name or path.name))
    for changed in (to.parent, to, path.parent):
        sync_folder(changed)


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


@contextlib.contextmanager
def wrap_write_errors(folder: Path, advice: str = "") -> Iterator[None]:
    """Turn a failed write into a message that says that nothing is lost.

    Args:
        folder: what is written.
        advice: what to do; empty where ``folder`` is a run, which can be gone on with.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (why := failed_write(error)) is None:
            raise
        # MLX does not say which error it was.
        full = not isinstance(error, OSError) or error.errno in _FULL
        first = "free some space" if full else "when that is mended"
        advice = advice or f"{first}, then: mlx-fd resume {shlex.quote(str(folder))}"
        raise _cannot_write(folder, why, advice) from error


def _cannot_write(folder: Path, why: str, advice: str) -> UserError:
    return UserError(
        f"{folder}: cannot be written ({why}). What was saved before is whole; {advice}"
    )


def check_new(folder: Path, advice: str = "choose another --out") -> None:
    """Make sure that a run can be made in a folder: it is empty, or a run was only begun there.

    Args:
        folder: where.
        advice: what to do where it cannot.

    Raises:
        UserError: there is a run in it, what is left of one, or something else.
    """
    if is_run(folder) and is_ours(folder):
        raise UserError(
            f"{folder}: this is already a run; continue with: "
            f"mlx-fd resume {shlex.quote(str(folder))}"
        )
    check_free(folder, RUN, advice)
    if work := _work_in(folder):
        # A new run would go on from it, whatever its options are.
        raise UserError(
            f"{folder}: there is work of an earlier run in it ({work}), but no {_missing(folder)}, "
            f"as in a copy that was cut short: copy all of it again, or {advice}"
        )
