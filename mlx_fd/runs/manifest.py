"""What a run was made of, and whether what is here now is the same."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from mlx_fd import problems as problem_sets
from mlx_fd import runs
from mlx_fd._version import __version__
from mlx_fd.config import Config
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.errors import UserError
from mlx_fd.models import fingerprint, ranks
from mlx_fd.models.chat_template import DEFAULT_DATE, ChatTemplate, fitted
from mlx_fd.models.resolve import why_changed
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records.manifest import (
    SCHEMA_VERSION,
    ChatTemplateRow,
    LearnedRow,
    Manifest,
    ModelRow,
)

Part = Literal["expert", "student", "problems"]
_PARTS: tuple[Part, ...] = ("expert", "student", "problems")
_COMPARED: tuple[Literal["versions", "backend"], ...] = ("versions", "backend")


def manifest_of(
    config: Config,
    expert: Path | None,
    student: Path,
    found: problem_sets.ProblemSet,
    vocab: int,
    template: ChatTemplate,
) -> Manifest:
    """What ``manifest.json`` holds.

    Args:
        config: of the run.
        expert: the expert's directory (of self-distillation, the critic's), if there is one.
        student: the student's.
        found: the problems that the run's were drawn from.
        vocab: tokens that student and expert share.
        template: how chats are written for the student.
    """

    def model(name: str, path: Path | None) -> ModelRow:
        if path is None:
            return {"name": name, "path": "", "sha256": ""}
        digest = fingerprint.content_hash(path)
        kind = fingerprint.FORMAT
        return {"name": name, "path": str(path), "sha256": digest, "fingerprint": kind}

    made: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "backend": backend_settings(),
        "seed": config.episode.seed,
        "expert": model(config.selfdistill.critic or config.models.expert, expert),
        "student": model(config.models.student, student),
        "problems": {
            "name": found.name,
            "split": found.split,
            "sha256": found.sha256,
            "skipped_rows": found.skipped,
            "kind": found.problems[0].kind,
        },
        "shared_vocabulary": vocab,
        "chat_template": _template_row(template),
        "options": flat_options(config),
    }
    return {**made, "ranks": ranks.processes()} if ranks.processes() > 1 else made


def learned_rows(config: Config, manifest: Manifest) -> list[LearnedRow]:
    """What a run's student learned from, its own problems first, then those of earlier runs.

    Those of its probe and of a warm-up are drawn from the same source.

    Args:
        config: the run's.
        manifest: the run's; one of an older version names its own problems alone.
    """
    options = config.problems
    own: LearnedRow = {
        "name": options.problems,
        "split": options.split,
        "columns": options.columns,
        "sha256": manifest["problems"]["sha256"],
    }
    return [own, *(row for row in manifest.get("learned_before", []) if row != own)]


def _template_row(template: ChatTemplate) -> ChatTemplateRow:
    content = {
        "source": template.source,
        "special_tokens": dict(template.special_tokens),
        "end_tokens": list(template.end_tokens),
    }
    return cast(ChatTemplateRow, {**content, "sha256": content_digest(content)})


def trained_template(
    manifest: Mapping[str, Any], config: Config, folder: Path
) -> ChatTemplate | None:
    """The chat template that a run's student was trained with, tried.

    Args:
        manifest: the run's.
        config: the run's, with the template's further variables and the day that it prints.
        folder: the run directory, for errors.

    Returns:
        ``None`` where the run is of an older version and the student's own is the one.

    Raises:
        UserError: a run of an older version did not record it, or it was changed since.
    """
    row = manifest.get("chat_template")
    if row is None:
        if config.self_distils:
            return None
        raise UserError(
            f"{folder}: it began with a version of mlx-fd that did not record the chat template "
            "its student was trained with, its expert's; `mlx-fd resume "
            f"{shlex.quote(str(folder))}` adds it, where expert and student are here"
        )
    row = row if isinstance(row, dict) else {}
    content = {name: row.get(name) for name in ("source", "special_tokens", "end_tokens")}
    if content_digest(content) != row.get("sha256"):
        raise UserError(
            f"{folder / runs.MANIFEST}: the chat template in it was changed after it was written; "
            "bring the old file back"
        )
    return fitted(
        ChatTemplate(
            source=row["source"],
            special_tokens=row["special_tokens"],
            kwargs=config.models.chat_template_kwargs,
            date=config.models.template_date or DEFAULT_DATE,
            end_tokens=tuple(row["end_tokens"]),
            owner=str(folder),
        )
    )


# Where the run goes on is the same with another value of these; models and problems are compared by
# content.
_CHANGEABLE = (
    "expert",
    "critic",
    "student",
    "problems",
    "teacher_cache",
    "micro_batch",
    "grad_checkpoint",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "speculate",
)


# What a run did that began before there were these is what their defaults mean in its files.
_AS_BEFORE = frozenset(("batching", "places", "speculate"))


def flat_options(config: Config) -> dict[str, Any]:
    """Every option by its name, as JSON has it."""
    sections: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for options in sections.values() for name, value in options.items()}


def check_same(old: Manifest, new: Manifest, folder: Path) -> list[str]:
    """Compare a run's manifest with what is here now, before it is resumed.

    Returns:
        Differences that make a bit-identical resume uncertain.

    Raises:
        UserError: another model, other data or other options than the run began with.
    """
    try:
        unclear = []
        for part in _PARTS:
            found = fingerprint.compare(old[part], new[part])
            if found is None:
                unclear.append(
                    f"{folder}: it began with a version of mlx-fd that did not record all of its "
                    f"models: whether the {part} ({old[part]['name']}) is the same, tokenizer and "
                    "every weight, cannot be told; if you changed it, begin a new run"
                )
            elif not found:
                raise UserError(
                    f"{folder}: the run began with another {part} ({old[part]['name']}): "
                    f"{_why_other(part, old, new)}, or begin a new run."
                )
        options, now = old["options"], new["options"]
        # What a version did that had not the option yet need not be what its default does.
        if added := sorted(now.keys() - options.keys() - _AS_BEFORE):
            raise UserError(
                f"{folder / runs.MANIFEST}: this run began with an older mlx-fd, which had no "
                f"{added[0]}. Use that version, or begin a new run{_onwards(folder, options)}"
            )
        changed = {
            name: (value, now.get(name))
            for name, value in options.items()
            if now.get(name) != value
        }
        # Where a batch and the next one overlap depends on how many there are and where
        # checkpoints are due.
        overlaps = options.get("batching") == CONTINUOUS
        # With a last batch that was not full, the next one would leave problems out. With epochs,
        # phases, falling rates or looks of trust, all that was done depends on how many episodes
        # there were to be.
        whole = (
            options["episodes"] % options["batch_size"] == 0
            and options["epochs"] == 1
            and options["loss_weights"] in ("ema", "fixed")
            and options["lr_schedule"] == "constant"
            and (options["gate"] in ("always", "never") or not options["max_disagreement"])
            and not overlaps
        )
        uncertain = unclear + [
            f"{name} was {value}, is {new[part].get(name)}: the run goes on, but its last digits "
            "may differ from an uninterrupted one's"
            for part in _COMPARED
            for name, value in old[part].items()
            if new[part].get(name) != value
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / runs.MANIFEST}: this is not what mlx-fd wrote ({error!r}). Bring the old "
            "file back, or begin a new run."
        ) from error
    for name, (was, is_now) in changed.items():
        may_change = name in _CHANGEABLE and not (name == "checkpoint_every" and overlaps)
        if not may_change and not (name == "episodes" and whole):
            why = (
                " (what the run did depends on how long it was to be)" if name == "episodes" else ""
            )
            raise UserError(
                f"{folder / runs.CONFIG}: {name} was {was!r} when the run began and is {is_now!r} "
                f"now{why}. Put it back, or begin a new run: {_anew(folder, options)}"
            )
    return uncertain


def _onwards(folder: Path, options: Mapping[str, Any]) -> str:
    """How a new run takes up what an earlier one has learned; of the loop only."""
    if options.get("method"):
        return f": {_anew(folder, options)}"
    return f" where it stopped: mlx-fd loop --continue {shlex.quote(str(folder))}"


def _anew(folder: Path, options: Mapping[str, Any]) -> str:
    """The command that makes a run's like from its beginning."""
    command = "self-distill" if options.get("method") else "loop"
    if options.get("self_teacher") == "expert":
        command = "distil"
    return f"mlx-fd {command} --config {shlex.quote(str(folder / runs.CONFIG))} --out ANOTHER"


def check_alike(manifest: Manifest) -> None:
    """Make sure that all ranks are to make the same run.

    Raises:
        UserError: a model, the problems, an option or a version is not the same on all.
    """
    found = manifest["versions"]
    numbers = {name: found[name] for name in ("mlx", "mlx-lm", "mlx-fd")}
    for what, value in (
        ("the expert is", manifest["expert"]["sha256"]),
        ("the student is", manifest["student"]["sha256"]),
        ("the problems are", manifest["problems"]["sha256"]),
        ("the options are", manifest["options"]),
        ("the versions of mlx, mlx-lm and mlx-fd are", numbers),
    ):
        ranks.check_same(lambda value=value: content_digest(value), what)  # type: ignore[misc]


def _why_other(part: Part, old: Manifest, new: Manifest) -> str:
    """Why the models or problems of two manifests differ, and what to do about it."""
    name = old[part]["name"]
    if part == "problems" or name != new[part]["name"]:
        return "its content has changed since. Bring the old one back"
    return why_changed(name, old["versions"])


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    packages = ("mlx", "mlx-lm", "numpy", "transformers", "tokenizers")
    found = {"python": platform.python_version(), "system": platform.platform()}
    found["mlx-fd"] = __version__
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def changed_options(old: Manifest, new: Manifest) -> list[str]:
    """What the user is told of options that were changed, and may be, since the run began.

    Args:
        old: the run's manifest.
        new: that of what is here now; :func:`check_same` found nothing wrong with it.
    """
    was, now = ({**flat_options(Config()), **manifest["options"]} for manifest in (old, new))
    changed = [
        f"{name} was {was[name]!r}, is {now[name]!r}" for name in now if was[name] != now[name]
    ]
    return [f"{runs.CONFIG} was changed: {'; '.join(changed)}"] if changed else []


# What the BLAS and OpenMP that MLX and NumPy may use take their number of threads from, beside what
# is under "threads" since the first version.
_THREAD_VARIABLES = (
    "GOTO_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def backend_settings() -> dict[str, Any]:
    """What a run computes with, and how sums are split over threads: their last digits."""
    from mlx_fd.models.backend import backend

    here = backend()
    return {
        "device": here.device,
        "blas": here.blas.name,
        "blas_kernels": here.blas.kernels,
        "cpu_math": here.cpu_math,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS", f"all {os.cpu_count()}"),
        **{name: os.environ.get(name, "not set") for name in _THREAD_VARIABLES},
        "cores": _cores(),
    }


def _cores() -> int:
    """How many cores this process may use; with no number of threads set, BLAS uses them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
