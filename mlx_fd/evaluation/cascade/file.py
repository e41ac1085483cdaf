"""``cascade.json`` of a run: its promise and threshold, what scores mean, what was measured."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import cast

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import ModelRef, adapter_hash
from mlx_fd.files import write_json
from mlx_fd.models import fingerprint
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.records.cascade import CascadeFile

CASCADE = "cascade.json"
# 1 was of score heads alone, and did not say so.
FORMAT = 2


def write(run: Path, found: CascadeFile) -> None:
    """Write a calibration, or one with its evaluation, into its run."""
    with runs.wrap_write_errors(run, "free some space, then run the same command again."):
        write_json(run / CASCADE, with_digest(found))


def read(run: Path) -> CascadeFile | None:
    """A run's calibration; ``None`` where there is none.

    Raises:
        UserError: it is not what was written.
    """
    path = run / CASCADE
    again = f"mlx-fd cascade calibrate {shlex.quote(str(run))} with a promise makes it again"
    try:
        content, digested = read_checked(path)
    except FileNotFoundError:
        return None
    except (OSError, ChangedFile) as error:
        raise UserError(f"{path}: {error}; {again}") from error
    if not digested or content.get("format") != FORMAT:
        raise UserError(f"{path}: is of another version; {again}")
    return cast(CascadeFile, content)


def standing(run: Path, ref: ModelRef, expert: Path | None) -> CascadeFile | None:
    """A run's calibration by which its student keeps answers; ``None`` where none holds.

    Args:
        run: the run directory.
        ref: its student.
        expert: as for :func:`why_other`.
    """
    try:
        found = read(run)
    except UserError:  # one that cannot be read promises nothing
        return None
    if found is None or found["promise"]["threshold"] is None or why_other(found, ref, expert):
        return None
    return found


def why_other(found: CascadeFile, ref: ModelRef, expert: Path | None) -> str:
    """Why a calibration does not hold for models; empty: it does.

    Args:
        found: the calibration.
        ref: the student.
        expert: the expert's directory; ``None``: there is none, and only scores have a meaning.
    """
    assert ref.checkpoint is not None and ref.config is not None
    known = {name: row["sha256"] for name, row in found["models"].items()}
    if known["adapter"] != adapter_hash(ref.checkpoint, ref.config):
        return "the student has learned on since"
    if known["student"] != fingerprint.content_hash(ref.model):
        return "the student's base model is another one"
    if expert is not None and known["expert"] != fingerprint.content_hash(expert):
        return f"it was made with another expert, {found['models']['expert']['name']}"
    return ""
