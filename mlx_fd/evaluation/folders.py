"""Where an evaluation's results go, and what tells it from another one."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.evaluation.suites import Options
from mlx_fd.evaluation.target import Target
from mlx_fd.files import check_way, digest_of, read_text
from mlx_fd.models.storage import slug
from mlx_fd.problems.sources import SOURCES
from mlx_fd.runs.marks import EVALUATION, check_free

RESULTS = "eval.json"
# What older evaluations did not know is in a request only where it is not the default.
_NEW = frozenset(
    {"skip_bad_rows", "max_tokens", "columns", "answer_kind"}
    | {"best_of", "votes", "shots", "forgetting", "answers_by"}
    | {"thinking", "expert_thinking", "max_thinking_tokens"}
)
_FILES = ("problems", "transfer", "instructions", "processbench")


def choose_folder(target: Target, options: Options, out: Path | None = None) -> Path:
    """Where results go: into the run, else under the model's name in this folder.

    An evaluation that is done stays where it is: another one gets the next number, and the same one
    asked for again the same folder.

    Args:
        target: the student, its expert and the run they are of.
        options: the suite, its size and its files.
        out: a folder that was named instead.

    Raises:
        UserError: there is another evaluation in ``out``, or something that is not ours; or the way
            into the run leads through a link.
    """
    request = request_of(target, options)
    if out is not None:
        check_free(out, EVALUATION)
        if not _is_free(out, request):
            raise UserError(
                f"{out / RESULTS}: there is another evaluation, and it was left alone; choose "
                "another --out."
            )
        return out
    folder = _folder(target, options.suite)
    numbered = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    free = next(one for one in itertools.chain([folder], numbered) if _is_free(one, request))
    if target.run is not None:
        check_way(target.run, *free.relative_to(target.run).parts)
    return free


def _is_free(folder: Path, request: dict[str, Any]) -> bool:
    """Whether a folder is new or ours, without a finished evaluation but the one asked for."""
    try:
        check_free(folder, EVALUATION)
    except UserError:
        return False
    try:
        saved = json.loads(read_text(folder / RESULTS))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, UserError):
        return False
    return isinstance(saved, dict) and saved.get("asked") == request


def request_of(target: Target, options: Options) -> dict[str, Any]:
    """All that tells an evaluation from another one, as ``eval.json`` has it.

    Args:
        target: the student, its expert and the run they are of.
        options: the suite, its size and its files, of which the contents count.
    """
    chosen = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
        if name not in _NEW or value != getattr(Options, name)
    }
    hashes = {name: model["sha256"] for name, model in target.models.items()}
    named = {name: getattr(options, name) for name in _FILES}
    # A file under the same name may be another one by now.
    files = {
        name: digest_of(path)
        for name, one in named.items()
        if one is not None and one not in SOURCES and (path := Path(one).expanduser()).is_file()
    }
    return {**chosen, "sha256": hashes, **({"files": files} if files else {})}


def _folder(target: Target, suite: str) -> Path:
    if target.run is None:
        return Path("eval") / slug(target.name) / suite
    assert target.checkpoint is not None
    best = (target.run / runs.CHECKPOINTS / "best").resolve()
    name = suite if target.checkpoint == best else f"{suite}-{target.checkpoint.name}"
    return target.run / "eval" / name
