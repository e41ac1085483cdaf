"""Generated word problems in GSM8K's format, small enough for a model of a million parameters.

Beside each problem stands the truth about any answer to it: which step goes wrong first, how, and
what a right feedback says. All numbers are below 100 and every step is one calculation.

The splits cannot overlap: a problem is in train, validation or test by the hash of its question,
and the problems of ``transfer`` begin with numbers, and are told in sentences, that the other
splits do not have. Problems that are ``hard`` have three or four calculations.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, ProblemSet, Verdict
from mlx_fd.problems.prompts import Feedback

SPLITS = ("train", "validation", "test", "transfer")
SIZES = {"train": 4000, "validation": 500, "test": 500, "transfer": 500}
MAX_STEPS = 4
HARD, HARD_STEPS = "arithmetic-hard", (3, 4)
MOST = 99

NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo", "Zoe", "Max", "Eva")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "eggs")
_BOUGHT_IN = ("bags", "boxes")


@dataclass(frozen=True)
class _Phrases:
    """How a split tells its problems. {n}: who it is about, {m}: another, {o}: the things."""

    starts: tuple[int, ...]
    start: tuple[str, ...]
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    times: tuple[str, ...]
    groups: tuple[str, ...]
    distractors: tuple[str, ...]
    ask: tuple[str, ...]


_IN_DOMAIN = _Phrases(
    starts=(*range(2, 31), *range(41, 51)),
    start=("{n} has {y} {o}.", "{n} starts with {y} {o}."),
    plus=("{n} buys {y} more.", "{n} finds {y} {o}.", "{m} gives {n} {y} {o}."),
    minus=("{n} loses {y}.", "{n} sells {y} {o}.", "{n} gives {y} {o} to {m}."),
    times=("The number of {o} {times}.",),
    groups=("{n} buys {y} {c} with {z} {o} each.",),
    distractors=("{m} has {y} {p}.", "{n} is {y} years old."),
    ask=("How many {o} does {n} have now?", "How many {o} are left?"),
)
_TRANSFER = _Phrases(
    starts=tuple(range(31, 41)),
    start=("The number of {o} {n} starts with is {y}.", "Now {n} has {y} {o}."),
    plus=("{n} finds {y} more.", "{m} gives {y} more to {n}.", "{n} buys {y} {o}."),
    minus=("{n} sells {y}.", "{n} loses {y} {o}.", "{n} sells {y} to {m}."),
    times=("Now the number of {o} {times}.",),
    groups=("{n} finds {y} {c} with {z} {o} each.",),
    distractors=("Now {m} has {y} {p}.", "{m} is now {y} years old."),
    ask=("How many {o} does {n} have?", "How many {o} are left now?"),
)


@dataclass(frozen=True)
class Step:
    """One calculation, ``left op right = result``; the result may be wrong."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result}"


@dataclass(frozen=True)
class _Event:
    """A sentence of the story that changes the number: ``+ - *`` and a number, or ``g``: a * b."""

    op: str
    first: int
    second: int = 0


@dataclass(frozen=True)
class Exercise:
    """A generated problem.

    Attributes:
        question: its text.
        start: the number it begins with.
        events: what happens to that number, in order.
        steps: the right calculations.
    """

    question: str
    start: int
    events: tuple[_Event, ...]
    steps: tuple[Step, ...]

    @property
    def solution(self) -> str:
        """The worked solution, ending in ``#### n``."""
        return write(self.steps)


def calculate(left: int, op: str, right: int) -> int:
    """``left op right`` for op in ``+ - *``."""
    return left + right if op == "+" else left - right if op == "-" else left * right


def _step(left: int, op: str, right: int) -> Step:
    return Step(left, op, right, calculate(left, op, right))


def _steps(
    start: int, events: tuple[_Event, ...], place: int = -1, wrong: Step | None = None
) -> tuple[Step, ...]:
    """The calculations of a story; with ``wrong`` put at ``place``, and calculated on from it."""
    steps: list[Step] = []

    def add(left: int, op: str, right: int) -> int:
        is_wrong = wrong is not None and len(steps) == place
        steps.append(wrong if wrong and is_wrong else _step(left, op, right))
        return steps[-1].result

    value = start
    for event in events:
        if event.op == "g":
            value = add(value, "+", add(event.first, "*", event.second))
        else:
            value = add(value, event.op, event.first)
    return tuple(steps)


# -------------------------------------------------------------------------------------- problems


def _event(rng: random.Random, value: int, room: int) -> _Event | None:
    """Something that can happen to ``value`` in at most ``room`` steps; ``None``: try again."""
    op = rng.choice("++--*g" if room > 1 else "++--*")
    if op == "+" and value < MOST:
        return _Event("+", rng.randint(1, min(30, MOST - value)))
    if op == "-" and value > 1:
        return _Event("-", rng.randint(1, min(30, value - 1)))
    if op == "*" and value * 2 <= MOST:
        return _Event("*", rng.choice((2, 3) if value * 3 <= MOST else (2,)))
    if op == "g":
        first, second = rng.randint(2, 9), rng.randint(2, 9)
        return _Event("g", first, second) if value + first * second <= MOST else None
    return None


def exercise(rng: random.Random, *, steps: int | None = None, transfer: bool = False) -> Exercise:
    """Draw a problem.

    Args:
        rng: where the draws come from.
        steps: the difficulty, in calculations; ``None``: 1 to 4, drawn too.
        transfer: numbers to begin with, and sentences, that are held out.
    """
    phrases = _TRANSFER if transfer else _IN_DOMAIN
    wanted = steps or rng.choices(range(1, MAX_STEPS + 1), (1, 2, 2, 2))[0]
    name, other = rng.sample(NAMES, 2)
    thing, another = rng.sample(THINGS, 2)
    start = value = rng.choice(phrases.starts)
    events: list[_Event] = []
    story = [rng.choice(phrases.start).format(n=name, y=start, o=thing)]
    done = 0
    while done < wanted:
        event = _event(rng, value, wanted - done)
        if event is None:
            continue
        sentences = {"+": phrases.plus, "-": phrases.minus, "*": phrases.times}
        story.append(
            rng.choice(sentences.get(event.op, phrases.groups)).format(
                n=name,
                m=other,
                o=thing,
                y=event.first,
                z=event.second,
                c=rng.choice(_BOUGHT_IN),
                times={2: "doubles", 3: "triples"}.get(event.first),
            )
        )
        events.append(event)
        value = _steps(value, (event,))[-1].result
        done += 2 if event.op == "g" else 1
    if rng.random() < 0.3:
        distractor = rng.choice(phrases.distractors)
        place = rng.randint(1, len(story))
        story.insert(place, distractor.format(n=name, m=other, y=rng.randint(2, 30), p=another))
    story.append(rng.choice(phrases.ask).format(n=name, o=thing))
    return Exercise(" ".join(story), start, tuple(events), _steps(start, tuple(events)))


def split_of(question: str) -> str:
    """The split that an in-domain question belongs to: a tenth each is validation and test."""
    digit = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 10
    return SPLITS[1 + digit] if digit < 2 else SPLITS[0]


def exercises(split: str, seed: int, *, steps: tuple[int, ...] = ()) -> Iterator[Exercise]:
    """Endless problems of a split, the same for the same seed; some may come twice.

    Args:
        split: one of :data:`SPLITS`.
        seed: of the draws.
        steps: numbers of calculations, each as likely; none: 1 to 4.

    Raises:
        UserError: there is no such split.
    """
    _check_split(split)
    rng = random.Random(f"{'hard/' if steps else ''}{split}/{seed}")
    while True:
        wanted = rng.choice(steps) if steps else None
        drawn = exercise(rng, steps=wanted, transfer=split == "transfer")
        if split in ("transfer", split_of(drawn.question)):
            yield drawn


def _check_split(split: str) -> None:
    if split not in SPLITS:
        near = difflib.get_close_matches(split.lower(), SPLITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"arithmetic has no split {split!r}, only {', '.join(SPLITS)}{hint}")


@functools.cache
def problems_of(split: str, *, hard: bool = False) -> tuple[Exercise, ...]:
    """What :func:`load` gives, with all that is known of each problem.

    Raises:
        UserError: there is no such split.
    """
    different: dict[str, Exercise] = {}
    for drawn in exercises(split, 0, steps=HARD_STEPS if hard else ()):
        different.setdefault(drawn.question, drawn)
        if len(different) == SIZES[split]:
            break
    return tuple(different.values())


@functools.cache
def load(split: str, *, hard: bool = False) -> ProblemSet:
    """The problems of ``train`` (4,000), ``validation``, ``test`` or ``transfer`` (500 each).

    Raises:
        UserError: there is no such split.
    """
    name = HARD if hard else "arithmetic"
    problems = tuple(
        Problem(
            f"{name}-{split}-{place:05d}",
            drawn.question,
            drawn.solution,
            str(drawn.steps[-1].result),
        )
        for place, drawn in enumerate(problems_of(split, hard=hard))
    )
    rows = "".join(
        json.dumps({"answer": p.solution, "question": p.question}) + "\n" for p in problems
    )
    return ProblemSet(name, split, problems, hashlib.sha256(rows.encode()).hexdigest())


# ------------------------------------------------------------------------------------- solutions

_STEP = re.compile(r"<<\s*(\d{1,4})\s*([-+*])\s*(\d{1,4})\s*=\s*(-?\d{1,5})\s*>>")
_NUMBER = re.compile(r"\d+")
_FINAL = re.compile(r"####\s*(-?\d{1,5})")


def write(steps: tuple[Step, ...], final: int | None = None) -> str:
    """A solution as text.

    Args:
        steps: its calculations.
        final: the number it ends with; ``None``: the last result.
    """
    lines = [f"Step {k}: <<{step}>>{step.result}" for k, step in enumerate(steps, 1)]
    end = steps[-1].result if final is None else final
    return "\n".join([*lines, f"#### {end}"])


_TYPED = re.compile(
    r"(\d{1,4})[ \t]{0,8}([-+*])[ \t]{0,8}(\d{1,4})[ \t]{0,8}=[ \t]{0,8}(-?\d{1,5})"
)


def write_step(step: str) -> str:
    """A typed calculation, ``47 + 2 = 49``, as solutions have it; anything else as it is."""
    found = _TYPED.fullmatch(step.strip())
    if not found:
        return step
    left, op, right, result = found.groups()
    return f"<<{left}{op}{right}={result}>>{result}"


def read(text: str) -> tuple[tuple[Step, ...], int | None]:
    """The calculations in a solution's ``<<a+b=c>>`` marks, and its final number."""
    steps = tuple(
        Step(int(left), op, int(right), int(result))
        for left, op, right, result in _STEP.findall(text)
    )
    finals = _FINAL.findall(text)
    return steps, int(finals[-1]) if finals else None


_WORDS = {"+": "plus", "-": "minus", "*": "times"}


def prose(solution: str) -> str:
    """A solution as another author writes it: the same calculations in sentences, without marks.

    Args:
        solution: in the form that :func:`write` gives.
    """
    steps, _ = read(solution)
    story = [f"{s.left} {_WORDS[s.op]} {s.right} is {s.result}." for s in steps]
    return " ".join([*story, f"So the answer is {steps[-1].result}."])


# -------------------------------------------------------------------------------------- judgement

SLIP = "a slip"
OPERATION = "the wrong operation"
QUANTITY = "the wrong quantity"
MISSED = "a missed step"
EXTRA = "an extra step"
FINAL = "the wrong final answer"
KINDS = (SLIP, OPERATION, QUANTITY, MISSED, FINAL)


def _same(a: Step, b: Step) -> bool:
    swapped = Step(b.right, b.op, b.left, b.result)
    return a == b or (b.op in "+*" and a == swapped)


def _kind(step: Step, right: Step, later: tuple[Step, ...]) -> str:
    """How ``step`` differs from the right one."""
    if (step.left, step.op, step.right) == (right.left, right.op, right.right):
        return SLIP
    if any((step.op, step.right) == (s.op, s.right) or _same(step, s) for s in later):
        return MISSED
    if {step.left, step.right} == {right.left, right.right}:
        return OPERATION
    return QUANTITY


def judge(solution: str, answer: str) -> Verdict:
    """Compare an answer with the right solution, step by step.

    The factors of a product and the terms of a sum may stand in either order. A step counts as
    wrong only by itself; this reads nothing after the first wrong one, as ProcessBench
    (arXiv 2412.06559) defines the first error.

    Args:
        solution: the right solution.
        answer: the answer's text, its steps marked as ``<<a+b=c>>``.
    """
    right, right_final = read(solution)
    steps, final = read(answer)
    for place, expected in enumerate(right):
        if place == len(steps):
            return Verdict(place + 1, MISSED)
        if not _same(steps[place], expected):
            return Verdict(place + 1, _kind(steps[place], expected, right[place + 1 :]))
    if len(steps) > len(right):
        return Verdict(len(right) + 1, EXTRA)
    if final != right_final:
        return Verdict(len(right) + 1, FINAL)
    return Verdict(0, "")


def is_generated(solution: str) -> bool:
    """Whether a solution is one of this module's, so that :func:`judge` knows about answers."""
    steps, _ = read(solution)
    return bool(steps) and write(steps) == solution


def true_rewrite(solution: str, answer: str) -> str:
    """An answer to a generated problem with its right steps verbatim and the others mended.

    Args:
        solution: the right solution.
        answer: the answer's text.
    """
    error = judge(solution, answer).first_error
    if not error:
        return answer
    kept: list[str] = []
    for line in answer.strip().split("\n"):
        if len(kept) == error - 1 or not read(line)[0]:
            break
        kept.append(line)
    return "\n".join([*kept, *solution.split("\n")[len(kept) :]])


def error_span(solution: str, answer: str) -> tuple[int, int] | None:
    """Where the first wrong step stands in an answer: its first character, and one past its last.

    It is the step's line; where the answer stops short, or just its final number is wrong, the line
    of that number; where it has none, what would come at the end.

    Args:
        solution: the right solution.
        answer: the answer's text.

    Returns:
        ``None`` where all is right.
    """
    error = judge(solution, answer).first_error
    if not error:
        return None
    marks = list(_STEP.finditer(answer))
    finals = list(_FINAL.finditer(answer))
    if error <= len(marks):
        at = marks[error - 1].start()
    elif finals:
        at = finals[-1].start()
    else:
        return len(answer), len(answer) + 1
    end = answer.find("\n", at)
    return answer.rfind("\n", 0, at) + 1, len(answer) if end < 0 else end


# ---------------------------------------------------------------------------------- wrong answers


def _slip(rng: random.Random, result: int) -> int:
    """A wrong result as people and small models get it: a digit is off, or two change places."""
    near = [result + d for d in (-10, -2, -1, 1, 2, 10)]
    swapped = int(str(result)[::-1])
    drawn = rng.choice([*near, swapped, rng.randint(1, MOST)])
    return drawn if 1 <= drawn <= MOST and drawn != result else _slip(rng, result)


def _replace(rng: random.Random, kind: str, step: Step, numbers: list[int]) -> Step:
    """A step with an error of the given kind."""
    if kind == SLIP:
        return Step(step.left, step.op, step.right, _slip(rng, step.result))
    if kind == OPERATION:
        return _step(step.left, rng.choice([op for op in "+-*" if op != step.op]), step.right)
    left, right = step.left, step.right
    if rng.random() < 0.25:
        left = rng.choice([*numbers, _slip(rng, left)])
    else:
        right = rng.choice([*numbers, _slip(rng, right)])
    return _step(left, step.op, right)


def wrong_answer(rng: random.Random, drawn: Exercise, kind: str | None = None) -> str:
    """An answer with one error, calculated on from there without another.

    Args:
        rng: where the draws come from.
        drawn: the problem.
        kind: one of :data:`KINDS`; ``None``: drawn too. Where the problem has no such error
            within the range of numbers, it is a :data:`SLIP`.
    """
    numbers = [int(n) for n in _NUMBER.findall(drawn.question)]
    right = drawn.steps
    for attempt in itertools.count():
        wanted = kind or rng.choices(KINDS, (4, 4, 4, 4, 1))[0]
        if attempt > 50 or (wanted == MISSED and len(drawn.events) == 1):
            wanted = SLIP
        if wanted == FINAL:
            return write(right, _slip(rng, right[-1].result))
        if wanted == MISSED:
            gone = rng.randrange(len(drawn.events))
            steps = _steps(drawn.start, drawn.events[:gone] + drawn.events[gone + 1 :])
        else:
            place = rng.randrange(len(right))
            wrong = _replace(rng, wanted, right[place], numbers)
            steps = _steps(drawn.start, drawn.events, place, wrong)
        text = write(steps)
        in_range = all(1 <= step.result <= MOST for step in steps)
        if in_range and judge(drawn.solution, text).kind == wanted:
            return text
    raise AssertionError("the loop ends with a return")


# -------------------------------------------------------------------------------------- feedback

ALL_RIGHT = "Every step is right."
_DIGIT = re.compile(r"\d(?! should)")  # that is no step's number
_CHECK = re.compile(
    r"(?:Step (\d)|The final answer) should (?:not be there\b|be [^\s,]+, it is "
    r"(?:missing\b|[^\s:]+: (?:(right)\b|(?:an?|the) \w)))"
)


def _passed(right: tuple[Step, ...], steps: tuple[Step, ...]) -> list[str]:
    """What is said of steps that are found right, each beside what it should be."""
    return [
        f"Step {k} should be {step}, it is {written}: right."
        for k, (step, written) in enumerate(zip(right, steps, strict=False), 1)
    ]


def feedback_text(solution: str, answer: str) -> str:
    """The right feedback on an answer: each step done again and compared, up to the first error.

    :func:`first_error` reads the verdict back.

    Args:
        solution: the right solution.
        answer: the answer's text.
    """
    verdict = judge(solution, answer)
    right, _ = read(solution)
    steps, final = read(answer)
    last = verdict.first_error - 1 if verdict.first_error else len(right)
    said = _passed(right[:last], steps[:last])
    if verdict.kind == EXTRA:
        said.append(f"Step {last + 1} should not be there.")
    elif last == len(right):
        shown = "missing" if final is None else f"{final}: {verdict.kind or 'right'}"
        said.append(f"The final answer should be {right[-1].result}, it is {shown}.")
        said += [] if verdict.first_error else [ALL_RIGHT]
    elif last == len(steps):
        said.append(f"Step {last + 1} should be {right[last]}, it is missing.")
    else:
        said.append(
            f"Step {last + 1} should be {right[last]}, it is {steps[last]}: {verdict.kind}."
        )
    return " ".join(said)


def feedback(solution: str, answer: str) -> Feedback:
    """The right feedback on an answer, with its score."""
    return Feedback(feedback_text(solution, answer), judge(solution, answer).score)


def careless_feedback(solution: str, answer: str) -> Feedback:
    """A feedback that does every step again, sets the answer's beside it, and finds all right.

    Args:
        solution: the right solution.
        answer: a finished answer; its steps beyond those of the solution are not looked at.
    """
    right, _ = read(solution)
    steps, final = read(answer)
    end = f"The final answer should be {right[-1].result}, it is {final}: right."
    return Feedback(" ".join([*_passed(right, steps), end, ALL_RIGHT]), 1.0)


def first_error(text: str) -> int | None:
    """The first wrong step that a feedback names.

    Returns:
        The step from 1 (one past the last step for a wrong final answer); 0 where it says that
        all is right; ``None`` where it cannot be read.
    """
    steps = 0
    for found in _CHECK.finditer(text):
        number, right = found.groups()
        if not right:
            return int(number) if number else steps + 1
        steps = int(number) if number else steps
    return 0 if ALL_RIGHT in text else None


def amateur_feedback(rng: random.Random, drawn: Exercise, answer: str) -> str:
    """A feedback as a model that has not learned to judge writes it: often wrong, well-formed."""
    other = rng.choice([drawn.solution, wrong_answer(rng, drawn)])
    text = feedback_text(drawn.solution, rng.choice([other, answer]))
    for _ in range(rng.randint(0, 2)):
        digits = [m.start() for m in _DIGIT.finditer(text)]
        if digits:
            place = rng.choice(digits)
            text = text[:place] + str(rng.randint(0, 9)) + text[place + 1 :]
    return (
        text if rng.random() < 0.9 else rng.choice([ALL_RIGHT, text[: rng.randint(9, 60)].strip()])
    )
