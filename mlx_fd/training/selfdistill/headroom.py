"""Is there something to learn from oneself? Held-out problems before any update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.files import write_json
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import are_graded, form_of, known
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.events import Note, Probing, Warned
from mlx_fd.runs.records.self_distillation import SelfHeadroomRow
from mlx_fd.runs.self_distillation_summary import WRONG
from mlx_fd.training.checkpoint import Records, kept
from mlx_fd.training.selfdistill.batch import Learner, Report, build_views, step_seeds
from mlx_fd.training.selfdistill.rollouts import as_read, grade_answers, sample_rollouts


@dataclass(frozen=True)
class Headroom:
    """Is there something to learn from oneself? Counts on held-out problems, before any update.

    Where no right answer is known only ``problems`` and ``taught`` are.

    Attributes:
        problems: how many there were.
        right: problems that the student answers right, by one answer drawn as attempts are.
        mixed: problems with right and with wrong attempts, which policies learn from.
        taught: problems with an attempt that the self-teacher has something to read about.
        without: of those, answered right without the context.
        with_context: of those, answered right with it.
        expert: problems that the expert answers right, where it is the teacher.
    """

    problems: int
    right: int | None
    mixed: int | None
    taught: int
    without: int | None
    with_context: int | None
    expert: int | None = None

    @property
    def losses(self) -> dict[str, float]:
        """What the gate watches: the share answered wrong; nothing where that is not known."""
        return {} if self.right is None else {WRONG: 1 - self.right / self.problems}

    def to_json(self) -> SelfHeadroomRow:
        """For the files that keep it."""
        row: SelfHeadroomRow = {
            "problems": self.problems,
            "right": self.right,
            "mixed": self.mixed,
            "taught": self.taught,
            "without": self.without,
            "with_context": self.with_context,
        }
        return row if self.expert is None else {**row, "expert": self.expert}

    def concerns(self, config: Config) -> list[str]:
        """What the user should know before hours are spent; empty where all is well."""
        options, concerns = config.selfdistill, list[str]()
        if self.expert is not None and self.right is not None:
            if self.expert <= self.right:
                concerns.append(
                    f"the expert answers {self.expert} of {self.problems} held-out problems right, "
                    f"the student {self.right}: there may be nothing to learn"
                )
            return concerns
        matches = options.objective not in ("grpo", "contrastive") and options.context != "none"
        if matches and not self.taught:
            concerns.append(
                f"the context {options.context} is empty for all {self.problems} held-out "
                "problems: there is nothing to learn from"
            )
        elif (
            matches
            and self.with_context is not None
            and self.without is not None
            and self.with_context <= self.without
        ):
            concerns.append(
                f"the model answers {self.with_context} of {self.taught} held-out problems right "
                f"with the context {options.context}, {self.without} without: it may be unable "
                "to use that context, and there may be nothing to learn"
            )
        if not matches and options.num_generations > 1 and self.mixed == 0:
            concerns.append(
                f"on each of the {self.problems} held-out problems all attempts are right or "
                "all are wrong: group advantages are zero there"
            )
        return concerns


def initial_headroom(
    records: Records, learner: Learner, held_out: Sequence[Problem], begun: bool
) -> tuple[Headroom, float]:
    """The check of the untrained student, and its seconds: what is kept of it, or made now."""
    folder, report = records.folder, learner.report
    found = kept(records, runs.HEADROOM, lambda: _load_headroom(folder), begun, report)
    if found is not None:
        return found
    report(Note(f"first probe evaluation: {len(held_out)} held-out problems"))
    begin = time.perf_counter()
    headroom = measure_headroom(learner, held_out)
    seconds = round(time.perf_counter() - begin, 3)
    with runs.wrap_write_errors(folder):
        write_json(folder / runs.HEADROOM, with_digest({**headroom.to_json(), "seconds": seconds}))
    return headroom, seconds


def _load_headroom(folder: Path) -> tuple[tuple[Headroom, float], bool] | None:
    """The headroom that is kept, the seconds it took, and whether a digest vouches for it."""
    try:
        content, digested = read_checked(folder / runs.HEADROOM)
    except FileNotFoundError:
        return None
    try:
        # Older versions did not measure how long it took.
        seconds = float(content.pop("seconds", 0.0))
        return (Headroom(**content), seconds), digested
    except (TypeError, AttributeError, ValueError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error


def say_headroom(headroom: Headroom, config: Config, report: Report) -> None:
    """Report what the check found, and what in it is worth a warning."""
    report(Note(_headroom_says(headroom, config)))
    for concern in headroom.concerns(config):
        report(Warned(concern))


def _headroom_says(headroom: Headroom, config: Config) -> str:
    context = config.selfdistill.context
    if headroom.right is None:
        on_context = (
            f"; the context {context} has something to say on {headroom.taught} of the "
            f"{headroom.problems} held-out problems"
        )
        return "no right answers are known: there is no headroom to measure" + (
            on_context if context != "none" else ""
        )
    text = (
        f"headroom on {headroom.problems} held-out problems: {headroom.right} right; "
        f"{headroom.mixed} with both right and wrong attempts"
    )
    if headroom.expert is not None:
        return f"{text}; the expert: {headroom.expert} right"
    if headroom.taught and context != "none":
        text += (
            f"; of {headroom.taught} with a context ({context}): "
            f"{headroom.without} right without it, {headroom.with_context} with it"
        )
    return text


def measure_headroom(learner: Learner, problems: Sequence[Problem]) -> Headroom:
    """Answers with the context against answers without, by the untrained student."""
    config, student_lm, on_progress = (
        learner.config,
        learner.models.student_lm,
        learner.on_progress(0, "headroom"),
    )
    # Three times through the problems: attempts, answers without the context and with it.
    count = len(problems)
    if not are_graded(problems) and config.selfdistill.context == "none":
        return Headroom(count, None, None, 0, None, None)
    learner.report(Probing(0, 3 * count))
    groups, _ = sample_rollouts(
        student_lm, problems, config, step_seeds(config, 0, "headroom"), on_progress
    )
    learner.report(Probing(count, 3 * count))
    views = build_views(learner, groups, 0)
    if not are_graded(problems):
        size = config.selfdistill.num_generations
        has_view = [view.teacher is not None for view in views]
        taught_of = sum(any(has_view[at : at + size]) for at in range(0, len(has_view), size))
        return Headroom(count, None, None, taught_of, None, None)
    plain = grade_answers(
        student_lm,
        problems,
        [answer_prompt(as_read(p, config), form_of(p)) for p in problems],
        config,
        on_progress,
    )
    taught: dict[int, str] = {}
    at = 0
    for index, group in enumerate(groups):
        seen = [view.teacher for view in views[at : at + len(group)] if view.teacher is not None]
        at += len(group)
        if seen:
            taught[index] = seen[0]
    rights = [known(attempt.correct for attempt in group) for group in groups]
    mixed = sum(0 < sum(right) < len(right) for right in rights)
    if (expert := learner.models.expert(config.selfdistill)) is not None:
        learner.report(Probing(2 * count, 3 * count))
        asked = [answer_prompt(p.question, form_of(p)) for p in problems]
        best = known(grade_answers(expert, problems, asked, config, on_progress))
        return Headroom(count, sum(known(plain)), mixed, 0, 0, 0, expert=sum(best))
    # The context may be empty for some.
    learner.report(Probing(2 * count, 2 * count + len(taught)))
    informed = grade_answers(
        student_lm,
        [problems[index] for index in taught],
        list(taught.values()),
        config,
        on_progress,
    )
    return Headroom(
        problems=len(problems),
        right=sum(known(plain)),
        mixed=mixed,
        taught=len(taught),
        without=sum(known(plain[index] for index in taught)),
        with_context=sum(known(informed)),
    )
