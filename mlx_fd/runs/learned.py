"""The questions that a run's student learned from, by which others are known to be held out.

They are those of the run's problems, of its probe, of its warm-up and of the runs that it goes on
with. Where a stopped run has not come to a problem it counts all the same: it may yet.
"""

from __future__ import annotations

from pathlib import Path

from mlx_fd.files import open_to_read
from mlx_fd.problems.questions import question_digest
from mlx_fd.runs.directory import QUESTIONS, read_attempts, read_episodes
from mlx_fd.runs.plan import Plan


def question_digests(plan: Plan) -> frozenset[str]:
    """Of what a run's student is to learn from, or has."""
    problems = (*plan.probe, *plan.warm_up, *plan.problems)
    return plan.learned | {question_digest(problem.question) for problem in problems}


def read_questions(folder: Path) -> frozenset[str]:
    """The digests of the questions that a run's student learned from.

    A run of an older version knows of its logs alone.

    Args:
        folder: the run directory.

    Raises:
        UserError: there is a pipe or a device in the file's place.
    """
    path = folder / QUESTIONS
    if path.exists():
        with open_to_read(path) as file:
            return frozenset(file.read().decode(errors="replace").split())
    logged = (*read_episodes(folder), *read_attempts(folder))
    return frozenset(question_digest(row["question"]) for row in logged)
