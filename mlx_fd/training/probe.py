"""The probe set: a few held-out problems that the gate watches, and the headroom check on them.

The expert's side (its answers, its feedback, what its hidden states say about it) is computed once;
looking at the student again costs one forward pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_fd import runs
from mlx_fd.config import Config, GenerationOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.asking import OnTokens, Seeds, derive_seed
from mlx_fd.feedback.distill import measure
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample, TeacherOutputs, gather_samples, sample_of, solution_of
from mlx_fd.feedback.stages import Answered, Judged
from mlx_fd.feedback.turns import (
    answer,
    as_student,
    expert_feedback,
    first_answers,
    judge,
    said_by_expert,
    student_feedback,
)
from mlx_fd.feedback.verdicts import review
from mlx_fd.files import digest_of, write_json, write_with
from mlx_fd.models import ranks
from mlx_fd.models.student import read_arrays
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import are_graded
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.records.parts import CountRow
from mlx_fd.runs.records.summary import HeadroomJudgedRow, HeadroomRow, HeadroomVerdictsRow

PROBE_ARRAYS = "probe.safetensors"
# A judge that says the same of every answer judges half of right and wrong ones rightly. The expert
# is to be better than the student by so much at least: not by luck on a few problems.
_MIN_BETTER = 0.1


@dataclass(frozen=True)
class Headroom:
    """Is there something to distil? Counts on the probe problems, before any update.

    A model judges well where its written score is positive on a right first answer and not positive
    on a wrong one. Where no right answer is known there are the models' verdicts in the place of
    what is right: an answer is good by the expert's verdict where the expert's score is positive.

    Attributes:
        problems: how many there were.
        expert_right: problems the expert answers right, at the temperature of first answers where
            it writes those, greedily where the student does.
        student_right: problems the student answers right.
        expert_judged: answers the expert scored (its score could be read).
        expert_judged_right: those it judged well.
        student_judged: answers the student scored in its text.
        student_judged_right: those it judged well.
        verdicts: of problems without right answers.
        judged: the judged answers that are wrong and that are right, apart; ``None`` where no right
            answer is known, and in runs of older versions.
    """

    problems: int
    expert_right: int | None
    student_right: int | None
    expert_judged: int
    expert_judged_right: int | None
    student_judged: int
    student_judged_right: int | None
    verdicts: HeadroomVerdictsRow | None = None
    judged: HeadroomJudgedRow | None = None

    def to_json(self) -> HeadroomRow:
        """For the files that keep it."""
        row: HeadroomRow = {
            "problems": self.problems,
            "expert_right": self.expert_right,
            "student_right": self.student_right,
            "expert_judged": self.expert_judged,
            "expert_judged_right": self.expert_judged_right,
            "student_judged": self.student_judged,
            "student_judged_right": self.student_judged_right,
        }
        if self.verdicts is not None:
            row["verdicts"] = self.verdicts
        if self.judged is not None:
            row["judged"] = self.judged
        return row

    def concerns(self) -> list[str]:
        """What the user should know before hours are spent; empty where all is well."""
        found = [] if self.verdicts is None else _concerns_of_verdicts(self.verdicts)
        if (
            self.expert_right is not None
            and self.student_right is not None
            and self.expert_right <= self.student_right
        ):
            found.append(
                f"the expert answers {self.expert_right} of {self.problems} probe problems right, "
                f"the student {self.student_right}: there may be nothing to learn at answering"
            )
        if self.expert_judged * 2 < self.problems:
            found.append(
                f"the expert's score could be read in {self.expert_judged} of {self.problems} "
                "feedbacks: the score loss has little to learn from"
            )
        if self.judged is not None:
            found += _concerns_of_judging(self.judged)
        return found


def _concerns_of_judging(judged: HeadroomJudgedRow) -> list[str]:
    """Is the expert the better judge, of wrong and of right answers by halves?

    Of all answers together a student that finds every one right would judge as well as many of
    them are right.
    """
    expert = _balanced(judged["expert_on_wrong"], judged["expert_on_right"])
    student = _balanced(judged["student_on_wrong"], judged["student_on_right"])
    if expert is None or student is None or expert >= student + _MIN_BETTER:
        return []
    return [
        f"the expert finds {_of(judged['expert_on_wrong'])} wrong answers and passes "
        f"{_of(judged['expert_on_right'])} right ones, the student "
        f"{_of(judged['student_on_wrong'])} and {_of(judged['student_on_right'])}: its feedback "
        "may be hardly better than the student's"
    ]


def _balanced(on_wrong: CountRow, on_right: CountRow) -> float | None:
    """The mean share judged well, of wrong and of right answers; of one kind where that is all."""
    shares = [one["count"] / one["n"] for one in (on_wrong, on_right) if one["n"]]
    return sum(shares) / len(shares) if shares else None


def _of(count: CountRow) -> str:
    return f"{count['count']} of {count['n']}"


def _concerns_of_verdicts(verdicts: HeadroomVerdictsRow) -> list[str]:
    found = []
    expert, student, agreed = verdicts["expert"], verdicts["student"], verdicts["agreement"]
    # Of as many answers each, or nearly: shares are compared.
    if (
        expert["n"]
        and student["n"]
        and expert["count"] / expert["n"] <= (student["count"] / student["n"])
    ):
        found.append(
            f"by the expert's own verdict {expert['count']} of {expert['n']} of its answers are "
            f"good, and {student['count']} of {student['n']} of the student's: there may be "
            "nothing to learn at answering"
        )
    if agreed["n"] and agreed["count"] == agreed["n"]:
        found.append(
            f"the student's verdict is the expert's on all of the {agreed['n']} answers that both "
            "scored: there may be little to learn at judging"
        )
    return found


@dataclass(frozen=True)
class Probe:
    """The probe set of a run.

    Attributes:
        samples: the expert's feedback on the first answers as it is taught, ready to measure the
            student with; and where a loss is on solutions, the expert's right ones.
        headroom: the check before the first update.
        seconds: what making it took.
    """

    samples: tuple[Sample, ...]
    headroom: Headroom
    seconds: float = 0.0

    def losses(self, pair: Pair, config: Config) -> dict[str, float]:
        """The student's mean losses on the probe set, as it is now."""
        micro_batch = config.training.micro_batch
        return measure(
            pair.student, pair.expert, self.samples, config.losses, pair.vocab, micro_batch
        )


def _scores(
    pair: Pair,
    answered: Sequence[Answered],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[float | None]:
    """The expert's written scores of some answers."""
    given = expert_feedback(pair, answered, options, seed, on_tokens)
    return [one.feedback.written_score for one in given]


@dataclass(frozen=True)
class _Look:
    """What both models made of one probe problem; scores are written ones, ``None`` unreadable.

    Attributes:
        right: whether its first answer is right; ``None``: nobody knows, here and below.
        expert: the expert's score of that.
        student: the student's score of that.
        best_right: whether the expert's own answer is right.
        own_right: whether the student's own is.
        best: the expert's score of its own answer, where nobody knows what is right.
        own: the expert's score of the student's own, likewise.
    """

    right: bool | None
    expert: float | None
    student: float | None
    best_right: bool | None
    own_right: bool | None
    best: float | None = None
    own: float | None = None


def _headroom(looks: Sequence[_Look], *, graded: bool) -> Headroom:
    """The headroom check; ``graded``: right answers are known."""
    by_expert = [one.expert for one in looks]
    by_student = [one.student for one in looks]
    expert_judged = len(_read(by_expert))
    student_judged = len(_read(by_student))
    if not graded:
        return Headroom(
            problems=len(looks),
            expert_right=None,
            student_right=None,
            expert_judged=expert_judged,
            expert_judged_right=None,
            student_judged=student_judged,
            student_judged_right=None,
            verdicts=_verdicts(looks),
        )
    judged: HeadroomJudgedRow = {
        "expert_on_wrong": _judged(looks, by_expert, right=False),
        "expert_on_right": _judged(looks, by_expert, right=True),
        "student_on_wrong": _judged(looks, by_student, right=False),
        "student_on_right": _judged(looks, by_student, right=True),
    }
    return Headroom(
        problems=len(looks),
        expert_right=sum(bool(one.best_right) for one in looks),
        student_right=sum(bool(one.own_right) for one in looks),
        expert_judged=expert_judged,
        expert_judged_right=sum(
            judged[kind]["count"] for kind in ("expert_on_wrong", "expert_on_right")
        ),
        student_judged=student_judged,
        student_judged_right=sum(
            judged[kind]["count"] for kind in ("student_on_wrong", "student_on_right")
        ),
        judged=judged,
    )


def _read(scores: Sequence[float | None]) -> list[float]:
    return [score for score in scores if score is not None]


def _judged(looks: Sequence[_Look], scores: Sequence[float | None], *, right: bool) -> CountRow:
    """Of the first answers that are right (or wrong) and were scored, how many were judged well."""
    of = [score for one, score in zip(looks, scores, strict=True) if one.right is right]
    return {"count": sum((score > 0) == right for score in _read(of)), "n": len(_read(of))}


def _verdicts(looks: Sequence[_Look]) -> HeadroomVerdictsRow:
    def good(scores: Sequence[float | None]) -> CountRow:
        read = _read(scores)
        return {"count": sum(score > 0 for score in read), "n": len(read)}

    both = [
        (one.expert > 0) == (one.student > 0)
        for one in looks
        if one.expert is not None and one.student is not None
    ]
    return {
        "expert": good([one.best for one in looks]),
        "student": good([one.own for one in looks]),
        "agreement": {"count": sum(both), "n": len(both)},
    }


def make_probe(
    pair: Pair,
    problems: Sequence[Problem],
    config: Config,
    on_tokens: OnTokens,
    on_problems: Callable[[int], None] = lambda done: None,
) -> Probe:
    """Run both models over the probe problems, in batches of the run's size.

    Args:
        pair: the models; the student untrained.
        problems: held out from the run's.
        config: token limits, seed, losses.
        on_tokens: called with a step's name and its new tokens.
        on_problems: called after each batch with the number of problems evaluated so far.
    """
    begun = time.perf_counter()
    size = config.generation.batch_size
    looks: list[_Look] = []
    samples: list[Sample] = []
    left_out: set[int] = set()
    for number, begin in enumerate(range(0, len(problems), size)):
        chunk = ranks.share(problems[begin : begin + size])
        seeds = _seeds(config.episode.seed, number)
        judged, best, found = _look(
            pair, chunk, config.generation, seeds, on_tokens, graded=are_graded(problems)
        )
        looks += [_Look(*row) for row in ranks.gather([dataclasses.astuple(one) for one in found])]
        reviewed = review(
            pair, judged, config.losses.expert_verdicts, config.generation, seeds, on_tokens
        )
        given = [one.judged if one.taught.expert is None else one.taught for one in reviewed]
        are_taught = ranks.gather([one.taught.expert is not None for one in reviewed])
        left_out.update(
            place for place, is_taught in enumerate(are_taught, len(samples)) if not is_taught
        )
        samples += gather_samples(
            [sample_of(pair, one, config.losses).without_own() for one in given]
        )
        if config.losses.on_solutions:
            samples += gather_samples(
                [
                    solution_of(pair, one.problem, one.answer, config.losses)
                    for one in best
                    if one.is_correct
                ]
            )
        on_problems(min(begin + size, len(problems)))
    seconds = round(time.perf_counter() - begun, 3)
    # With an expert that is wrong on all problems there is nothing better to measure.
    if len(left_out) < len(problems):
        samples = [one for place, one in enumerate(samples) if place not in left_out]
    headroom = _headroom(looks, graded=are_graded(problems))
    return Probe(tuple(samples), headroom, seconds)


def _look(
    pair: Pair,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seeds: Seeds,
    on_tokens: OnTokens,
    *,
    graded: bool,
) -> tuple[list[Judged], list[Answered], list[_Look]]:
    """Both models on a batch of probe problems.

    Returns:
        The first answers with both models' feedback; the expert's own answers; and what came of
        each problem.
    """
    answered = first_answers(pair, problems, options, seeds("answer"), on_tokens)
    students = student_feedback(pair, answered, options, seeds("student_feedback"), on_tokens)
    experts = expert_feedback(pair, answered, options, seeds("expert_feedback"), on_tokens)
    judged = judge(answered, students, dict(enumerate(experts)))
    own = answer(
        pair.student_lm,
        problems,
        as_student(options),
        seeds("student_answer"),
        on_tokens,
        temperature=options.student_temperature,
        keep=False,
    )
    best = [one.answered for one in judged]
    if options.answers_by == "student":
        best = answer(pair.expert, problems, options, 0, on_tokens, temperature=0.0, keep=False)
    looks = [
        _Look(
            right=one.answered.is_correct,
            expert=expert.feedback.written_score,
            student=student.feedback.written_score,
            best_right=its_best.is_correct,
            own_right=its_own.is_correct,
        )
        for one, expert, student, its_best, its_own in zip(
            judged, experts, students, best, own, strict=True
        )
    ]
    if graded:
        return judged, best, looks

    def scores(of: Sequence[Answered], step: str) -> list[float | None]:
        given = expert_feedback(pair, of, options, seeds(f"verdict/{step}"), on_tokens)
        return [one.feedback.written_score for one in given]

    of_best = [one.expert for one in looks]
    if options.answers_by == "student":
        of_best = scores(best, "expert")
    of_own = scores(said_by_expert(pair, own), "student")
    looks = [
        dataclasses.replace(one, best=its_best, own=its_own)
        for one, its_best, its_own in zip(looks, of_best, of_own, strict=True)
    ]
    return judged, best, looks


def _seeds(seed: int, number: int) -> Seeds:
    return lambda step: derive_seed(seed, number, ranks.step_name(f"probe/{step}"))


def save_probe(probe: Probe, folder: Path) -> None:
    """Keep the probe set in the run directory; the JSON file is written last."""
    arrays: dict[str, mx.array] = {}
    rows = []
    for place, sample in enumerate(probe.samples):
        named = sample.expert.arrays()
        arrays |= {f"{place}/{name}": array for name, array in named.items()}
        rows.append(sample.to_json())
    digest = write_with(folder / PROBE_ARRAYS, lambda path: mx.save_safetensors(str(path), arrays))
    content = {
        "sha256": digest,
        "headroom": probe.headroom.to_json(),
        "seconds": probe.seconds,
        "samples": rows,
    }
    write_json(folder / runs.PROBE, with_digest(content))


def load_probe(folder: Path) -> tuple[Probe, bool] | None:
    """The probe set that :func:`save_probe` kept, and whether a digest vouches for all of it.

    Returns:
        ``None`` where there is none.

    Raises:
        ChangedFile: it is not what was written.
    """
    try:
        content, digested = read_checked(folder / runs.PROBE)
    except FileNotFoundError:
        return None
    try:
        if content["sha256"] != digest_of(folder / PROBE_ARRAYS):
            raise ChangedFile(f"something changed {PROBE_ARRAYS}")
        arrays = read_arrays(folder / PROBE_ARRAYS)
        of_samples: list[dict[str, mx.array]] = [{} for _ in content["samples"]]
        for name, array in arrays.items():
            place, _, what = name.partition("/")
            of_samples[int(place)][what] = array
        samples = tuple(
            Sample.from_json(row, TeacherOutputs.of(named))
            for row, named in zip(content["samples"], of_samples, strict=True)
        )
        mx.eval(of_samples)
        # Older versions did not measure how long it took.
        seconds = float(content.get("seconds", 0.0))
        return Probe(samples, Headroom(**content["headroom"]), seconds), digested
    except ChangedFile:
        raise
    except FileNotFoundError as error:
        raise ChangedFile(f"{PROBE_ARRAYS} is missing") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, UserError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error
