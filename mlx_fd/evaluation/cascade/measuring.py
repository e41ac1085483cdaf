"""The two steps: a calibration on some held-out problems, an evaluation on others."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from collections.abc import Callable, Collection, Sequence

from mlx_fd import problems as sources
from mlx_fd.errors import UserError
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cascade import choice, confidence, curve, file
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.outcomes import outcomes
from mlx_fd.evaluation.cascade.scores import SCORES, Score
from mlx_fd.evaluation.held_out import concerns, distinct, learned_from, source_of, unlearned
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.target import Target
from mlx_fd.feedback.judge import locate_model
from mlx_fd.models.context import fitting
from mlx_fd.problems import Problem, ProblemSet
from mlx_fd.problems.kinds import KINDS, are_graded
from mlx_fd.problems.questions import question_digest
from mlx_fd.runs.records.cascade import CascadeFile, CascadeMeasuredRow, CascadePromiseRow

Progress = Callable[[str, int, int], None]
Warn = Callable[[str], None]
"""Called with a sentence about the problems."""


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
    bench: Bench,
    held: Held,
    score: Score,
    kind: str,
    target: float,
    on_progress: Progress,
    warn: Warn,
) -> CascadeFile:
    """Choose a threshold that keeps a promise.

    Args:
        bench: of a run with an expert.
        held: problems that the student did not learn from.
        score: what its answers are scored by.
        kind: of the promise, as in :func:`mlx_fd.evaluation.cascade.choice.choose`.
        target: likewise.
        on_progress: called with a step, the problems done, and their number.
        warn: told what there is to know of the problems.

    Raises:
        UserError: no threshold keeps the promise (of a risk: and the run has a calibration with
            one, which stays), or there is no cascade.
    """
    found, chosen, _ = _problems(bench.target, held, (), warn)
    made = outcomes(bench, chosen, score, on_progress)
    promise = choice.choose(made, score, kind, target)
    if not promise["kept"]:
        raise UserError(_unkept(made, promise))
    if promise["threshold"] is None and kind == choice.RISK:
        _check_nothing_is_lost(bench.target, promise, len(made))
    return {
        "format": file.FORMAT,
        "models": {
            name: row for name, row in bench.target.models.items() if name != "chat_template"
        },
        "score": score.name,
        "promise": promise,
        "confidence": confidence.steps(made),
        "ids": [problem.id for problem in chosen],
        "questions": [question_digest(problem.question) for problem in chosen],
        "calibration": _measured(made, found, promise),
        "evaluation": None,
    }


def evaluate(
    bench: Bench, held: Held, calibrated: CascadeFile, on_progress: Progress, warn: Warn
) -> CascadeFile:
    """Hold a calibration against problems that it has not seen; arguments as :func:`calibrate`.

    Raises:
        UserError: the calibration is of other models or does not say which questions it was made
            on, or no problem is left.
    """
    target = bench.target
    # Ids tell nothing: rows of any two files may be numbered from 0 on.
    if "questions" not in calibrated:
        raise UserError(
            f"{target.name}: its calibration was made by an older version, which did not record "
            "the questions that are to be left out here; calibrate again (no answer is generated "
            "anew)"
        )
    ref = locate_model(target.name)
    if why := file.why_other(calibrated, ref, target.expert):
        if file.why_other(calibrated, ref, None):
            raise UserError(
                f"{target.name}: its calibration does not hold any more: {why}; calibrate again"
            )
        made_with = shlex.quote(calibrated["models"]["expert"]["name"])
        raise UserError(
            f"{target.name}: its calibration does not hold for {target.config.models.expert}: "
            f"{why}; add --expert {made_with}, or calibrate again"
        )
    found, chosen, left_out = _problems(target, held, calibrated["questions"], warn)
    made = outcomes(bench, chosen, SCORES[calibrated["score"]], on_progress)
    measured = _measured(made, found, calibrated["promise"])
    return {**calibrated, "evaluation": {**measured, "left_out": left_out}}


def _problems(
    target: Target, held: Held, used: Collection[str], warn: Warn
) -> tuple[ProblemSet, tuple[Problem, ...], int]:
    """Held-out problems: all of their source, those that are taken, and how many were used."""
    source = source_of(target, held.source)
    if learned_from(target, source, held.split):
        raise UserError(
            f"{target.name}: the run learned from these problems ({source}, split {held.split}), "
            "so nothing would be promised on others; choose another --split or --problems"
        )
    found = _load(target, source, held.split)
    for text in (*found.notes, *concerns(target, held.source, held.split)):
        warn(text)
    new = unlearned(target, found.problems)
    if len(new) < len(found.problems):
        warn(
            f"{source} ({held.split}): {len(found.problems) - len(new)} of {len(found.problems)} "
            "problems are left out, which the run learned from elsewhere"
        )
    if not new:
        raise UserError(
            f"{source} ({held.split}): the run learned from all {len(found.problems)} problems; "
            "name other --problems"
        )
    different = distinct(new)
    if len(different) < len(new):
        # A promise counts problems as independent draws, which these are not.
        warn(
            f"{source} ({held.split}): {len(new) - len(different)} of {len(new)} problems are left "
            "out, which repeat the question of an earlier one"
        )
        new = different
    used = set(used)
    left = [problem for problem in new if question_digest(problem.question) not in used]
    chosen = tuple(left[: held.limit])
    if not chosen:
        raise UserError(
            f"{source} ({held.split}): the calibration has used all {len(new)} "
            "problems; calibrate with a smaller --limit, or name other --problems"
        )
    paths = [path for path in (target.student, target.expert) if path is not None]
    part = dataclasses.replace(found, problems=chosen)
    fitting(part, paths, target.config, skip=False, option="")
    return found, chosen, len(new) - len(left)


def _load(target: Target, source: str, split: str) -> ProblemSet:
    """Problems with answers of the kind that the student is asked for, whoever asks it.

    Raises:
        UserError: they cannot be read, or have answers of another kind or none.
    """
    kind = target.answer_kind or "auto"
    if kind in KINDS:
        if not KINDS[kind].graded:
            raise UserError(
                f"{target.name}: the run learned from problems without right answers (kind "
                f"{kind}), and in their form its student gives none that could be graded; a "
                "cascade needs a run on problems with right answers"
            )
        KINDS[kind].available()
    try:
        found = sources.load(source, split, kind=kind)
    except UserError:
        found = sources.load(source, split)
        if found.problems[0].kind == kind:
            raise
    if not are_graded(found.problems):
        raise UserError(f"{source}: no right answers are known; a cascade is calibrated on some")
    if target.answer_kind not in (None, found.problems[0].kind):
        raise UserError(
            f"{source}: its answers are of the kind {found.problems[0].kind}, and the run learned "
            f"from answers of the kind {kind}, in whose form its student is asked: what is "
            f"measured here would say nothing of that; name --problems with answers of the kind "
            f"{kind}"
        )
    return found


def _check_nothing_is_lost(target: Target, promise: CascadePromiseRow, n: int) -> None:
    """Refuse to write a promise by which all is passed on over a calibration with a threshold.

    Raises:
        UserError: the run has one that holds.
    """
    assert target.run is not None
    standing = file.standing(target.run, locate_model(target.name), target.expert)
    if standing is None:
        return
    kept = standing["promise"]
    raise UserError(
        f"--risk {promise['target']:g}: no threshold surely keeps it on these {n} problems: "
        f"{choice.ways_out(promise)}; {target.run / file.CASCADE} stays as it is, with its "
        f"--{kept['kind']} {kept['target']:g} (remove it first, if every request is to be passed "
        "on)"
    )


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
