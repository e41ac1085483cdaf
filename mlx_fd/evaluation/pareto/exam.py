"""The examination of the student at each stop, by the checkpoints that the run has kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.evaluation.exam import Result, compare, exam_questions, examine, load_results
from mlx_fd.evaluation.pareto.curve import Curve
from mlx_fd.evaluation.pareto.points import Point, batch_of
from mlx_fd.feedback.pair import open_pair
from mlx_fd.models.student import load_student
from mlx_fd.problems.sources import Question, names_with_truth
from mlx_fd.runs.checked import ChangedFile
from mlx_fd.runs.checkpoints import checkpoint_after
from mlx_fd.runs.manifest import check_same
from mlx_fd.runs.plan import make_plan
from mlx_fd.runs.records import EstimateRow

# Measures of the examination that are objectives; more of them is better, and all are shares.
EXAM_MEASURES = ("first_error_f1", "solved")


def examine_points(
    folder: Path,
    curve: Curve,
    points: Sequence[Point],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Point], list[str]]:
    """The points with the examination of the student at each, where its checkpoint is there.

    Args:
        folder: the run directory.
        curve: what was read from it.
        points: its points.
        progress: called with a step, the students examined, and their number.

    Returns:
        The points, and notes on those without a checkpoint.

    Raises:
        UserError: the run has no examination, or its models are not here.
    """
    plan = make_plan(curve.config)
    check_same(runs.read_manifest(folder), plan.manifest, folder)
    questions = exam_questions(plan.config)
    before = _results(folder, questions)
    pair = open_pair(plan)
    wanted = sorted({batch_of(point, curve) for point in points})
    measured: dict[int, dict[str, EstimateRow]] = {}
    for done, batch in enumerate(wanted):
        progress("students examined", done, len(wanted))
        checkpoint = checkpoint_after(folder, batch)
        if checkpoint is None:
            continue
        load_student(pair.student, checkpoint)
        after = examine(pair, questions, curve.config.generation, lambda step, tokens: None)
        measures = compare(before, after)
        measured[batch] = {name: measures[name]["after"] for name in EXAM_MEASURES}
    progress("students examined", len(wanted), len(wanted))
    missing = [str(batch) for batch in wanted if batch not in measured]
    notes = []
    if missing:
        notes.append(
            f"no checkpoint after batch {', '.join(missing)}: the examination is shown where there "
            "is one and is no objective; a run with --checkpoint-every 1 --keep-checkpoints "
            f"{len(curve.batches)} keeps all"
        )
    examined = [
        dataclasses.replace(p, metrics={**p.metrics, **measured.get(batch_of(p, curve), {})})
        for p in points
    ]
    return examined, notes


def _results(folder: Path, questions: Sequence[Question]) -> list[Result]:
    """What the student made of the examination before the run."""
    try:
        saved = load_results(folder / runs.EXAM, questions) if questions else None
    except (ChangedFile, OSError) as error:
        raise UserError(
            f"{folder / runs.EXAM}: {error}. Restore the old file, or leave --exam out."
        ) from error
    if saved is None:
        raise UserError(
            f"{folder}: this run has no examination; --exam is for runs on --problems "
            f"{names_with_truth()} with --exam-size above 0."
        )
    (results, _), _ = saved
    return results
