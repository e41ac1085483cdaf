"""A run whose student goes on where that of an earlier run ended, on other problems."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlx_fd import runs
from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import ModelRef, locate_model
from mlx_fd.files import remove, share, sync_file, sync_folder, working_folder
from mlx_fd.models.student import MADE_WITH, Student, load_student, save_weights
from mlx_fd.runs.continued import earlier_config
from mlx_fd.runs.learned import read_questions
from mlx_fd.runs.manifest import learned_rows
from mlx_fd.runs.plan import Plan
from mlx_fd.runs.records.manifest import Manifest


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
    manifest: Manifest = {**plan.manifest, "learned_before": before}
    return dataclasses.replace(plan, manifest=manifest, learned=read_questions(ref.run))


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
