"""A tutor's view of an attempt: which step is wrong, and hints that do not give the answer away.

A learner writes an attempt, one step to a line and the answer last. The student judges it as it
judges answers in the loop. What is shown of its feedback grows: first the place, then the reason
without any number, then what it says with only the numbers that the learner has before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlx_fd.config import GenerationOptions
from mlx_fd.feedback.judge import Judge, ModelRef
from mlx_fd.feedback.stages import verdict_score
from mlx_fd.feedback.turns import answer, as_student
from mlx_fd.problems import Problem
from mlx_fd.problems.arithmetic import first_error
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.kinds.choice import choices_in
from mlx_fd.problems.sources import step_writer

State = Literal["right", "wrong", "unsure"]
Mark = Literal["right", "wrong", "open"]

# Kinds whose final answers can be held beside each other without anything being run.
_COMPARED = ("number", "math", "choice", "text")
# What stands in a hint where something was left out.
HIDDEN = "\N{HORIZONTAL ELLIPSIS}"
_STEP_MARK = re.compile(
    r"[ \t]*+(?:step[ \t]*+\d{1,3}[ \t]*+[:.)]|\d{1,3}[:.)](?=[ \t]))?[ \t]*+", re.I
)
_ANSWER = re.compile(r"[ \t]*+(?:####|(?:final[ \t]++)?answer[ \t]*+[:=])[ \t]*+", re.I)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_STEP_NUMBER = re.compile(r"\bstep[ \t]{1,4}(\d{1,3})\b", re.I)
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t\n]+")
# A run of numbers that are hidden and the signs between them is one thing that is hidden.
_HIDDEN_SUM = re.compile(f"{HIDDEN}(?:[-+*/=<>,.\N{MULTIPLICATION SIGN}]{{1,3}}{HIDDEN})+")


@dataclass(frozen=True)
class Attempt:
    """What a learner wrote.

    Attributes:
        steps: without their numbers.
        final: what the attempt arrives at; empty: the learner has not said.
    """

    steps: tuple[str, ...]
    final: str


@dataclass(frozen=True)
class Heard:
    """What models make of an attempt.

    Attributes:
        text: the student's feedback.
        score: how good it finds the attempt, in [-1, 1]: the one in its text, or the head's where
            none can be read there; ``None`` where there is none. Its sign is the verdict, as in the
            loop.
        own_final: what the model that was asked the problem arrives at; ``None``: nothing that
            could be read, or nobody was asked.
        agrees: whether the attempt arrives at the same; ``None`` where one of them is missing.
    """

    text: str
    score: float | None
    own_final: str | None = None
    agrees: bool | None = None


@dataclass(frozen=True)
class Marked:
    """An attempt as a learner gets it back.

    Attributes:
        state: what all signs say together; ``unsure`` where they contradict each other, or say
            nothing.
        marks: of each step.
        final: of the answer.
        first_wrong: the step that the feedback names, from 1, one past the last for the answer;
            0: it finds every step right; ``None``: it does not say so that it can be read.
        hints: weak ones first; none for a right attempt.
    """

    state: State
    marks: tuple[Mark, ...]
    final: Mark
    first_wrong: int | None
    hints: tuple[str, ...]


def write_step_of(ref: ModelRef) -> Callable[[str], str]:
    """How a student knows steps of solutions: as those of its run's problems."""
    return step_writer("" if ref.config is None else ref.config.problems.problems)


def as_asked(problem: str, kind: str) -> Problem:
    """A problem that a learner brings, whose answer nobody has said.

    Args:
        problem: its text, choices below it where there are any.
        kind: of its answer, a name in :data:`mlx_fd.registry.KINDS`.
    """
    choices = choices_in(problem) if kind == "choice" else ()
    return Problem("", problem, "", "", kind, choices)


def agreement(asked: Problem, answer: str, own: str | None) -> bool | None:
    """Whether an attempt arrives at what a model arrived at.

    Args:
        asked: the problem, as :func:`as_asked` makes it.
        answer: the attempt as an answer.
        own: the model's final answer, in the kind's canonical form.

    Returns:
        ``None`` where one of them has no final answer, or those of the kind are not compared.
    """
    if own is None or asked.kind not in _COMPARED:
        return None
    final = read_final(answer, asked)
    return None if final is None else is_right(final, replace(asked, answer=own))


def read_attempt(text: str) -> Attempt:
    """An attempt's lines: steps, numbered or not, and the answer.

    Args:
        text: one step to a line; a line that begins with ``####`` or ``Answer:`` is the answer.
    """
    steps, final = [], ""
    for line in text.splitlines():
        mark = _ANSWER.match(line)
        if mark:
            final = line[mark.end() :].strip() or final
            continue
        begin = _STEP_MARK.match(line)
        step = line[begin.end() if begin else 0 :].strip()
        if step:
            steps.append(step)
    return Attempt(tuple(steps), final.strip())


def write_attempt(attempt: Attempt, write_step: Callable[[str], str]) -> str:
    """An attempt as an answer that the student can judge.

    Args:
        attempt: the learner's.
        write_step: how the student knows steps
            (:func:`mlx_fd.problems.sources.step_writer`).
    """
    lines = [f"Step {number}: {write_step(step)}" for number, step in enumerate(attempt.steps, 1)]
    if attempt.final:
        lines.append(f"#### {attempt.final}")
    return "\n".join(lines)


def marked(problem: str, attempt: Attempt, heard: Heard) -> Marked:
    """What a learner is told of an attempt.

    Args:
        problem: its text.
        attempt: the learner's.
        heard: what the models said.
    """
    if not attempt.final and heard.agrees is False:
        # What was compared is the last number of an attempt that may go on.
        heard = replace(heard, agrees=None)
    steps, first = len(attempt.steps), first_error(heard.text)
    state = _state(first, heard)
    marks: tuple[Mark, ...] = tuple(_mark(number, first) for number in range(1, steps + 1))
    final: Mark = "open"
    if heard.agrees is not None:
        final = "right" if heard.agrees else "wrong"
    elif first is not None and (attempt.final or first):
        final = _mark(steps + 1, first)
    hints = () if state == "right" else _hints(problem, attempt, heard, first)
    return Marked(state, marks, final, first, hints)


def as_json(problem: str, attempt: Attempt, heard: Heard, by: str) -> dict[str, Any]:
    """What a learner gets, as JSON.

    Args:
        problem: its text.
        attempt: the learner's.
        heard: what the models said.
        by: which of them was asked the problem, ``"student"`` or ``"expert"``.
    """
    seen = marked(problem, attempt, heard)
    steps = [
        {"text": text, "mark": mark} for text, mark in zip(attempt.steps, seen.marks, strict=True)
    ]
    return {
        "object": "tutor",
        "state": seen.state,
        "score": None if heard.score is None else round(heard.score, 4),
        "steps": steps,
        "final": {"text": attempt.final, "mark": seen.final},
        "first_wrong_step": seen.first_wrong,
        "checked_by": None if heard.agrees is None else by,
        "hints": list(seen.hints),
        "feedback": heard.text,
    }


def tutor(judge: Judge, problem: str, attempt: Attempt) -> dict[str, Any]:
    """Let a student look at an attempt, and solve the problem itself.

    Args:
        judge: the student.
        problem: its text.
        attempt: the learner's; it has a step or an answer.

    Returns:
        As :func:`as_json`.

    Raises:
        UserError: as :meth:`mlx_fd.feedback.judge.Judge.judge`.
    """
    asked = as_asked(problem, judge.ref.answer_kind)
    text = write_attempt(attempt, write_step_of(judge.ref))
    options = GenerationOptions() if judge.ref.config is None else judge.ref.config.generation
    [judgement] = judge.judge([(problem, text)], max_tokens=options.max_feedback_tokens)
    [own] = answer(
        judge.student_lm,
        [asked],
        as_student(options),
        0,
        lambda step, tokens: None,
        temperature=0,
        keep=False,
    )
    score, final = verdict_score(judgement.written_score, judgement.head_score), own.answer.final
    heard = Heard(judgement.text, score, final, agreement(asked, text, final))
    return as_json(problem, attempt, heard, "student")


def _mark(number: int, first: int | None) -> Mark:
    if first is None:
        return "open"
    if first == 0 or number < first:
        return "right"
    return "wrong" if number == first else "open"


def _state(first: int | None, heard: Heard) -> State:
    signs = [
        None if first is None else first == 0,
        None if not heard.score else heard.score > 0,
        heard.agrees,
    ]
    known = {sign for sign in signs if sign is not None}
    if known == {True}:
        return "right"
    return "wrong" if known == {False} else "unsure"


def _hints(problem: str, attempt: Attempt, heard: Heard, first: int | None) -> tuple[str, ...]:
    """Hints, weak ones first; none says what the one before it said."""
    steps = len(attempt.steps)
    if first and first <= steps:
        place = f"Look at step {first} again."
    elif first:
        place = "The steps that are there hold. Look at what comes after them."
    else:
        place = "Something does not fit. Check each step against the problem."
    said = _about(heard.text, first)
    secret = () if heard.own_final is None or heard.agrees else (heard.own_final,)
    before = "\n".join((problem, *attempt.steps, attempt.final))
    weak, strong = without_numbers(said, "", secret), without_numbers(said, before, secret)
    return tuple(dict.fromkeys(hint for hint in (place, weak, strong) if hint))


def _about(text: str, first: int | None) -> str:
    """What a feedback says of the first wrong step; all of it where that cannot be told."""
    sentences = [one.strip() for one in _SENTENCE_END.split(text) if one.strip()]
    if first:
        for at, sentence in enumerate(sentences):
            if any(int(number) == first for number in _STEP_NUMBER.findall(sentence)):
                return " ".join(sentences[at:])
        return sentences[-1] if sentences else ""
    return " ".join(sentences)


def without_numbers(text: str, before: str, secret: Sequence[str] = ()) -> str:
    """A text without the numbers that a learner has not before them.

    Numbers of steps stay. Numbers in words stay, too: they are not told apart from other words.

    Args:
        text: of a hint.
        before: what the learner has read and written.
        secret: what is left out besides, wherever it stands as a word of its own: right answers.
    """
    seen = set(_NUMBER.findall(before))
    steps = [match.span() for match in _STEP_NUMBER.finditer(text)]

    def hide(match: re.Match[str]) -> str:
        of_step = any(begin <= match.start() < end for begin, end in steps)
        return match[0] if of_step or match[0] in seen else HIDDEN

    found = _HIDDEN_SUM.sub(HIDDEN, _NUMBER.sub(hide, text))
    for word in secret:
        found = _without_word(found, word.strip())
    return found


def _without_word(text: str, word: str) -> str:
    """A text with a word hidden, in capitals or not; a single letter only as it is written."""
    if not word or word.isdigit():  # numbers were looked at
        return text
    where, lower = text, text.lower()
    if len(word) > 1 and len(lower) == len(text):  # of a few letters lower case is longer
        where, word = lower, word.lower()
    pieces, at = [], 0
    while (found := where.find(word, at)) >= 0:
        end = found + len(word)
        alone = not (where[found - 1 : found].isalnum() or where[end : end + 1].isalnum())
        pieces += [text[at:found], HIDDEN if alone else text[found:end]]
        at = end
    return "".join([*pieces, text[at:]])
