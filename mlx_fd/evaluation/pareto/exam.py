"""The examination of the student at each stop, by the checkpoints that the run has kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.evaluation.exam import compare, exam_questions, examine
from mlx_fd.evaluation.pareto.curve import Curve
from mlx_fd.evaluation.pareto.points import Point, batch_of
from mlx_fd.feedback.pair import open_pair
from mlx_fd.models.student import load_student
from mlx_fd.problems.sources import Question, names_with_truth
from mlx_fd.runs.checkpoints import checkpoint_after
from mlx_fd.runs.manifest import check_same
from mlx_fd.runs.plan import make_plan
from mlx_fd.runs.records.parts import EstimateRow

# Measures of the examination that are objectives; more of them is better, and all are shares.
EXAM_MEASURES = ("first_error_f1", "solved")
# The split that stops are chosen by.
CHOOSING = "validation"


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
    questions = _questions(folder, plan.config)
    pair = open_pair(plan)
    wanted = sorted({batch_of(point, curve) for point in points})
    measured: dict[int, dict[str, EstimateRow]] = {}
    for done, batch in enumerate(wanted):
        progress("students examined", done, len(wanted))
        checkpoint = checkpoint_after(folder, batch)
        if checkpoint is None:
            continue
        load_student(pair.student, checkpoint)
        found = examine(pair, questions, curve.config.generation, lambda step, tokens: None)
        measures = compare(found, found)
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


def _questions(folder: Path, config: Config) -> tuple[Question, ...]:
    """Questions to choose by, which are none of those that an evaluation reports."""
    if config.problems.split == CHOOSING:
        raise UserError(
            f"{folder}: this run learned from the split {CHOOSING}, whose questions --exam chooses "
            "by; leave --exam out."
        )
    questions = exam_questions(config, CHOOSING)
    if not questions:
        raise UserError(
            f"{folder}: this run has no examination; --exam is for runs on --problems "
            f"{names_with_truth()} with --exam-size above 0."
        )
    return questions
