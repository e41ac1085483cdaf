"""A run whose student goes on where that of an earlier run ended, on other problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fd import problems, runs
from mlx_fd.config import Config, ModelOptions, ProblemOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import ModelRef, locate_model
from mlx_fd.files import remove, share, sync_file, sync_folder, working_folder
from mlx_fd.models.student import MADE_WITH, Student, load_student, save_weights
from mlx_fd.problems.questions import question_key
from mlx_fd.registry import SOURCES
from mlx_fd.runs.manifest import learned_rows
from mlx_fd.runs.plan import Plan

# Of few problems, the share that is held out for the gate.
_PROBE = 5


def earlier_config(run: str) -> Path:
    """The configuration of the run that is gone on with.

    Raises:
        UserError: it is no run.
    """
    folder = Path(run).expanduser()
    if not runs.is_run(folder):
        raise UserError(f"--continue {run}: this is no run directory of mlx-fd loop")
    return folder / runs.CONFIG


def asked_kind(options: ProblemOptions, given: Mapping[str, Any]) -> str:
    """The kind of answers that problems are read with: that of the earlier run's student.

    It is asked in the form of that kind, and rows need not say which it is: years may be texts.

    Args:
        options: of the configuration that the run is made from.
        given: the options that were given; the earlier run and maybe ``problems`` among them.

    Raises:
        UserError: what is gone on with is no run.
    """
    source = given.get("problems") or options.problems
    if options.answer_kind != "auto" or source in SOURCES:
        return options.answer_kind
    folder = earlier_config(given["continue_from"]).parent
    kind: str = runs.read_manifest(folder)["problems"].get("kind", "number")
    return kind


def sizes(given: Mapping[str, Any], earlier: Config) -> dict[str, int]:
    """How many problems of a file are learned from and held out, where the user does not say: all.

    Args:
        given: the options that were given; ``problems`` among them.
        earlier: of the run that is gone on with; its options hold where none is given.

    Raises:
        UserError: the problems cannot be read, are fewer than two, or would all be held out.
    """
    if given.get("episodes") is not None:
        return {}
    skip = given.get("skip_bad_rows")
    found = problems.load(
        given["problems"],
        given.get("split") or earlier.problems.split,
        skip_bad_rows=earlier.problems.skip_bad_rows if skip is None else bool(skip),
        kind=given.get("answer_kind") or "auto",
        columns=given.get("columns") or "",
    )
    # One question counts once: a probe's must not come up again.
    count = len({question_key(problem.question) for problem in found.problems})
    if count < 2:
        raise UserError(
            f"{given['problems']}: it has {count} problem; one more at least is needed, to be held "
            "out"
        )
    most = earlier.episode.probe_size
    probe = given.get("probe_size") or min(most, max(1, count // _PROBE))
    if probe >= count:
        raise UserError(
            f"--probe-size {probe}: {given['problems']} has {count} problems, and one at least is "
            f"to be learned from; ask for at most {count - 1}"
        )
    return {"episodes": count - probe, "probe_size": probe}


def check_continues(plan: Plan) -> Plan:
    """Make sure that a plan's student can begin with the earlier run's.

    Returns:
        The plan; its manifest says what the student has learned from already.

    Raises:
        UserError: it is another model, has other LoRA, or was asked in another way.
    """
    ref, options = _earlier(plan), plan.config.models
    assert ref.config is not None
    name = options.continue_from
    if ref.model != plan.student_path:
        raise UserError(f"--continue {name}: its student is {ref.model}, not {plan.student_path}")
    # More than what load_student would find.
    other = [one for one in MADE_WITH if getattr(ref.config.models, one) != getattr(options, one)]
    if other:
        raise UserError(
            f"--continue {name}: its student was made with other options ({_shown(other, ref)}); "
            "leave them out here"
        )
    if ref.template is not None and ref.template.digest() != plan.template.digest():
        raise UserError(
            f"--continue {name}: its student knows another chat template than this expert's; take "
            f"its expert, {ref.config.models.expert}"
        )
    assert ref.run is not None
    before = learned_rows(ref.config, runs.read_manifest(ref.run))
    return dataclasses.replace(plan, manifest={**plan.manifest, "learned_before": before})


def _shown(names: list[str], ref: ModelRef) -> str:
    options: ModelOptions | None = ref.config.models if ref.config else None
    return ", ".join(f"{name} = {getattr(options, name)}" for name in names)


def _earlier(plan: Plan) -> ModelRef:
    name = plan.config.models.continue_from
    earlier_config(name)
    ref = locate_model(name)
    if ref.config is None or ref.config.self_distils:
        raise UserError(f"--continue {name}: its student has no score head: it is no loop's run")
    return ref


def begin(folder: Path, plan: Plan, student: Student) -> None:
    """Put the weights into a student with which its run begins, or began.

    Args:
        folder: the run directory; where there is a run in it, it has them.
        plan: the run's.
        student: freshly made.

    Raises:
        UserError: they are missing or damaged.
    """
    if runs.is_run(folder):
        load_student(student, folder / runs.BEGUN)
        return
    checkpoint = _earlier(plan).checkpoint
    assert checkpoint is not None
    load_student(student, checkpoint)


def keep(folder: Path, student: Student) -> None:
    """Write those weights where a run is to be made: the earlier run may go on, or go.

    They are the student's own, and not read again: meanwhile the earlier run's best checkpoint may
    have become another one. A kill leaves all of them or none.

    Args:
        folder: the run directory, locked; there is no run in it yet.
        student: as it begins.
    """
    kept = folder / runs.BEGUN
    with working_folder(folder) as working:
        save_weights(student, working)
        for path in working.iterdir():
            sync_file(path)
        sync_folder(working)
        share(working)
        # Of a run that was killed before it began.
        remove(kept)
        working.rename(kept)
    sync_folder(folder)
