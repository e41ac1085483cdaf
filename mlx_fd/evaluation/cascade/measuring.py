"""The two steps: a calibration on some held-out problems, an evaluation on others."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence

from mlx_fd import problems as sources
from mlx_fd.errors import UserError
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cascade import choice, confidence, curve, file
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.outcomes import outcomes
from mlx_fd.evaluation.cascade.scores import SCORES, Score
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.suites import learned_from, source_of
from mlx_fd.feedback.judge import locate_model
from mlx_fd.models.context import fitting
from mlx_fd.problems import Problem, ProblemSet
from mlx_fd.problems.kinds import are_graded
from mlx_fd.runs.records import CascadeFile, CascadeMeasuredRow, CascadePromiseRow

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out problems.

    Attributes:
        source: their source; ``None``: the run's, where that has a name.
        split: of it.
        limit: the most of them.
    """

    source: str | None
    split: str
    limit: int


def calibrate(
    bench: Bench, held: Held, score: Score, kind: str, target: float, on_progress: Progress
) -> CascadeFile:
    """Choose a threshold that keeps a promise.

    Args:
        bench: of a run with an expert.
        held: problems that the student did not learn from.
        score: what its answers are scored by.
        kind: of the promise, as in :func:`mlx_fd.evaluation.cascade.choice.choose`.
        target: likewise.
        on_progress: called with a step, the problems done, and their number.

    Raises:
        UserError: no threshold keeps the promise, or there is no cascade.
    """
    found, chosen = _problems(bench, held, ())
    made = outcomes(bench, chosen, score, on_progress)
    promise = choice.choose(made, score, kind, target)
    if not promise["kept"]:
        raise UserError(_unkept(made, promise))
    return {
        "format": file.FORMAT,
        "models": {
            name: row for name, row in bench.target.models.items() if name != "chat_template"
        },
        "score": score.name,
        "promise": promise,
        "confidence": confidence.steps(made),
        "ids": [problem.id for problem in chosen],
        "calibration": _measured(made, found, promise),
        "evaluation": None,
    }


def evaluate(
    bench: Bench, held: Held, calibrated: CascadeFile, on_progress: Progress
) -> CascadeFile:
    """Hold a calibration against problems that it has not seen; arguments as :func:`calibrate`.

    Raises:
        UserError: the calibration is of other models, or no problem is left.
    """
    target = bench.target
    if why := file.why_other(calibrated, locate_model(target.name), target.expert):
        raise UserError(
            f"{target.name}: its calibration does not hold any more: {why}; calibrate again"
        )
    found, chosen = _problems(bench, held, calibrated["ids"])
    made = outcomes(bench, chosen, SCORES[calibrated["score"]], on_progress)
    return {**calibrated, "evaluation": _measured(made, found, calibrated["promise"])}


def _problems(
    bench: Bench, held: Held, used: Sequence[str]
) -> tuple[ProblemSet, tuple[Problem, ...]]:
    target = bench.target
    source = source_of(target, held.source)
    if learned_from(target, source, held.split):
        raise UserError(
            f"{target.name}: the run learned from these problems ({source}, split {held.split}), "
            "so nothing would be promised on others; choose another --split or --problems"
        )
    found = sources.load(source, held.split)
    if not are_graded(found.problems):
        raise UserError(f"{source}: no right answers are known; a cascade is calibrated on some")
    left = tuple(problem for problem in found.problems if problem.id not in set(used))
    chosen = left[: held.limit]
    if not chosen:
        raise UserError(
            f"{source} ({held.split}): the calibration has used all {len(found.problems)} "
            "problems; calibrate with a smaller --limit, or name other --problems"
        )
    paths = [path for path in (target.student, target.expert) if path is not None]
    part = dataclasses.replace(found, problems=chosen)
    fitting(part, paths, target.config, skip=False, option="")
    return found, chosen


def _measured(
    found: Sequence[Outcome], problems: ProblemSet, promise: CascadePromiseRow
) -> CascadeMeasuredRow:
    data = curve.columns(found)
    against, of = choice.observed(found, promise["kind"], promise["threshold"])
    scores, student, expert = (list(data[name]) for name in ("score", "student", "expert"))
    area = Measure("above_random", scores, curve.above_random, (student, expert))
    return {
        "problems": f"{problems.name}/{problems.split}",
        "n": len(found),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "against": against,
        "of": of,
        "above_random": area.estimate().to_json(),
        "systems": curve.systems(found, promise["threshold"]),
        "curve": curve.curve(found),
    }


def _unkept(found: Sequence[Outcome], promise: CascadePromiseRow) -> str:
    n, target = len(found), promise["target"]
    if promise["kind"] == choice.COST:
        return (
            f"--cost {target:g}: {n} problems are too few to promise so small a share with "
            f"{promise['level']:.0%}; take a larger share, or a larger --limit"
        )
    right = sum(one.expert for one in found)
    return (
        f"--accuracy {target:g}: no threshold surely keeps it on these {n} problems: the expert "
        f"alone has {right} right; promise less, or take a larger --limit"
    )
