"""Rows of data sets, as people publish them, turned into problems.

What a row holds is told by its columns (:mod:`mlx_fd.problems.columns`). What kind of answers they
are is told by all rows together, since one row with ``12`` says nothing. A number is never pulled
out of a formula.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.columns import Parts, is_missing, others, parts_of, text_of
from mlx_fd.problems.kinds import KINDS, is_right, read_final
from mlx_fd.problems.kinds.choice import LETTERS, listed
from mlx_fd.problems.kinds.code import calls_check
from mlx_fd.problems.kinds.text import MAX_TEXT, words_of
from mlx_fd.problems.thoughts import without_thoughts
from mlx_fd.text import shown

# Of a question that is true or false, or is answered by yes or no.
_TRUTHS = {"yes": ("true",), "true": ("yes",), "no": ("false",), "false": ("no",)}
# From this share of the rows on they are not bad rows among numbers, but another kind.
_TEXTS, _FORMULAS = 1 / 3, 1 / 10
_FORMULA = re.compile(
    r"[\\^=_{}<>|]|[\d)\]][A-Za-z(\[]|[(\[][^()\[\],]*+,|[A-Za-z]\s?[+*/^]|\d\s?[-+*/]\s?[A-Za-z]\b"
)


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        columns: what a column stands for (see :data:`mlx_fd.problems.columns.COLUMNS`) -> its
            name in the file.
        kind: of the answers; ``"auto"``: told by the rows.
        skip_bad_rows: count rows that cannot be read instead of refusing all.
    """

    columns: tuple[tuple[str, str], ...] = ()
    kind: str = "auto"
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: where it is, and why."""

    where: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what is of this row alone."""
        if self.reason.startswith("duplicate id"):
            return "duplicate id"
        return self.reason.partition(" (")[0].partition(";")[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Read:
    """What was read of some rows.

    Attributes:
        problems: of the good rows.
        bad: the others, in the file's order.
        kind: of the answers.
        unread: columns that say something, and that nothing was taken from.
    """

    problems: list[Problem]
    bad: list[BadRow]
    kind: str
    unread: tuple[str, ...]


def problems_of(
    rows: Iterable[tuple[str, Mapping[str, Any] | str]], stem: str, reading: Reading
) -> Read:
    """Problems of some rows.

    Args:
        rows: where each is, and its columns, or why it could not be split into columns.
        stem: what ids begin with where rows have none.
        reading: how.

    Raises:
        UserError: a column that was named is in no row, or the kind's package is missing.
    """
    taken: list[tuple[str, int, Parts]] = []
    bad: list[tuple[int, BadRow]] = []
    named = dict(reading.columns)
    absent, found, beside = set(named.values()), False, dict[str, None]()
    for place, (where, row) in enumerate(rows):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            found = True
            absent -= row.keys()
            beside.update(dict.fromkeys(others(row, named)))
            taken.append((where, place, parts_of(row, named)))
        except ValueError as error:
            bad.append((place, BadRow(where, str(error))))
    if absent and found:
        raise UserError(f"--columns: no row has a column {shown(min(absent))}")
    unread = tuple(name for name in beside if name not in named.values())
    kind = reading.kind
    if kind == "auto":
        kind = _kind_of([row for _, _, row in taken])
        if kind == "none":
            _check_no_answer_is_missed(taken, unread)
        elif "answer" not in named:
            _check_answers_are_known(taken, unread)
    KINDS[kind].available()
    if kind == "choice":
        _check_places([row for _, _, row in taken])
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for where, place, parts in taken:
        try:
            problem = _problem(parts, kind, f"{stem}-{place:05d}")
        except ValueError as error:
            bad.append((place, BadRow(where, str(error))))
            continue
        if problem.id in seen:
            first = seen[problem.id]
            twice = f"duplicate id {shown(problem.id)} (first at {first})"
            bad.append((place, BadRow(where, twice)))
            continue
        seen[problem.id] = where
        problems.append(problem)
    in_order = [row for _, row in sorted(bad, key=lambda one: one[0])]
    return Read(problems, in_order, kind, unread)


def problem_of(row: Mapping[str, Any], kind: str) -> Problem:
    """The problem of one row whose kind of answers is known; ``ValueError`` with the reason."""
    return _problem(parts_of(row, {}), kind, "")


def reasons_of(bad: Iterable[BadRow]) -> tuple[tuple[str, int], ...]:
    """Why rows are bad, each with the number of its rows, the most frequent first."""
    return tuple(Counter(row.kind for row in bad).most_common())


def _check_no_answer_is_missed(
    rows: Sequence[tuple[str, int, Parts]], others: Sequence[str]
) -> None:
    """Refuse to take a file for one of prompts where another column may have the answers."""
    if others and not any(row.free for _, _, row in rows):
        raise UserError(
            f"{rows[0][0]}: no row has an answer, and columns that are not read are there: "
            f"{', '.join(map(repr, others))[:200]}; name what they are (--columns answer=NAME), "
            "or say that there are no answers (--answer-kind none)"
        )


def _check_answers_are_known(rows: Sequence[tuple[str, int, Parts]], others: Sequence[str]) -> None:
    """Refuse to take a whole solution for the answer where another column may have it."""
    where = next((where for where, _, row in rows if row.guessed), None)
    if others and where is not None:
        raise UserError(
            f"{where}: no column has the answer alone, its solution does not mark it (####, "
            "\\boxed), and columns that are not read are there: "
            f"{', '.join(map(repr, others))[:200]}; name the answer's (--columns answer=NAME, or "
            "answer=solution)"
        )


def _kind_of(rows: Sequence[Parts]) -> str:
    """The kind of all rows: a number is a formula and a text, too, but not the other way round."""
    counts = Counter(_own_kind(row) for row in rows if row.tests or not is_missing(row.answer))
    total = counts.total()
    if not total and rows and not any(row.blank for row in rows):
        return "none"
    if counts["code"] > total / 2:
        return "code"
    if counts["choice"] > total / 2:
        return "choice"
    if counts["none"] and counts["none"] >= _TEXTS * total:
        return "none"
    if counts["math"] and counts["math"] >= _FORMULAS * total:
        return "math"
    return "text" if counts["text"] and counts["text"] >= _TEXTS * total else "number"


def _own_kind(row: Parts) -> str:
    if row.tests:
        return "code"
    if row.choices:
        return "choice"
    answer = row.answer
    if isinstance(answer, list | tuple):
        found = {_own_kind(replace(row, answer=part)) for part in answer}
        # Several right answers of one kind are of that kind.
        return found.pop() if len(found) == 1 else "math" if "math" in found else "text"
    if isinstance(answer, bool | Mapping):
        return "text"
    if isinstance(answer, int | float):
        return "number"
    whole = str(answer)
    text = parsing.gold_part(whole)
    if parsing.is_number(text):
        return "number"
    # One of many good replies, unless it says itself what it comes to.
    if row.free and text == without_thoughts(whole).strip():
        return "none"
    if _FORMULA.search(text):
        return "math"
    # Longer ones are no replies to compare, word by word, with another.
    return "none" if row.free or len(text) > MAX_TEXT else "text"


def _check_places(rows: Sequence[Parts]) -> None:
    """Refuse places that count from 1, or are no places: they would mean another choice."""
    places = [
        (place, [text.strip() for text in row.choices])
        for row in rows
        if row.choices and (place := _place(row)) is not None
    ]
    if not places:
        return
    if all(place > 0 for place, _ in places) and any(a == len(of) for a, of in places):
        raise UserError(
            "the answers name choices by place, and seem to count from 1: none is 0, and one is as "
            "large as the number of choices; count from 0, or write letters"
        )
    as_text = [str(place) in choices for place, choices in places]
    as_both = [choices[place : place + 1] == [str(place)] for place, choices in places]
    if all(as_text) and not all(as_both):
        raise UserError(
            "each answer is a number and the text of one of its choices; as a number it would mean "
            'the choice at that place from 0; write letters, or the text itself ("12")'
        )


def _place(row: Parts) -> int | None:
    """The place of a choice that an answer is; CSV has all numbers as texts."""
    answer = row.answer
    if isinstance(answer, str) and answer.strip().isdecimal() and answer.isascii():
        answer = None if answer.strip() in {one.strip() for one in row.choices} else int(answer)
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    return answer if whole and str(answer) not in row.labels else None


def _problem(row: Parts, kind: str, default_id: str) -> Problem:
    answer = row.answer
    also: tuple[str, ...] = ()
    if not KINDS[kind].graded:
        return _ungraded(row, kind, default_id)
    if kind == "code":
        return _program(row, default_id)
    if is_missing(answer):
        raise ValueError("no 'answer'")
    if isinstance(answer, Mapping):  # SQuAD, DROP
        parts = answer.get("text", answer.get("spans"))
        if parts is None:
            raise ValueError("'answer' is not text but dict")
        answer = parts
    if isinstance(answer, list | tuple):
        if not answer:
            raise ValueError("'answer' is empty")
        answer, *rest = [_checked(part) for part in answer]
        also = tuple(KINDS[kind].gold(other, row.choices) for other in dict.fromkeys(rest))
    question, written = row.question, str(answer)
    if kind == "choice":
        if len(row.choices) < 2:
            raise ValueError("no 'choices'")
        label = written.strip()
        if found := [one for one in (label, label.upper()) if one in row.labels]:
            answer = row.labels.index(found[0])
        elif (place := _place(replace(row, answer=answer))) is not None:
            if all(one.isdecimal() for one in row.labels) and row.labels:
                raise ValueError(f"'answer' is none of the choices {', '.join(row.labels)}")
            answer = place
        question = listed(question, row.choices)
    elif row.choices:
        raise ValueError(f"has choices, but its answers are read as {kind}")
    gold = KINDS[kind].gold(_checked(answer), row.choices)
    if kind == "text":
        also = (*also, *_TRUTHS.get(gold.lower(), ()))
    others = tuple(other for other in dict.fromkeys(also) if other != gold)
    if kind == "choice" and others:
        raise ValueError("'answer' names several choices; mlx-fd asks for one")
    problem = Problem(
        id=row.id or default_id,
        question=question,
        # Of a float the shortest text that is this float.
        solution=written if row.solution is None else row.solution,
        answer=gold,
        kind=kind,
        choices=row.choices,
        also_right=others,
        published=parsing.gold_part(written),
    )
    if row.solution is not None:
        return problem
    if not _is_alone(written, problem) and is_right(read_final(written, problem), problem):
        return problem
    # An answer alone: models are to see it as replies end, a number as it is published.
    for final in (written.strip(), gold) if kind == "number" else (gold,):
        ended = f"#### {final}"
        if is_right(read_final(ended, problem), problem):
            return replace(problem, solution=ended)
    return problem


def _is_alone(written: str, problem: Problem) -> bool:
    """Whether a gold answer has nothing before it, and no mark and no box that say what it is."""
    text = written.strip()
    if "####" in text or parsing.gold_part(text) != text:
        return False
    if problem.kind != "choice":
        return True
    # Other kinds have no gold beside more; "B) since it rains" says why.
    letter = problem.answer
    choice = problem.choices[LETTERS.index(letter)]
    names = (letter, choice, f"{letter} {choice}")
    return words_of(text) in set(map(words_of, names))


def _program(row: Parts, default_id: str) -> Problem:
    """A problem whose answer is a program; its tests are its answer."""
    tests = KINDS["code"].gold(row.tests, ())
    question, solution = row.question, row.solution or ""
    if not calls_check(tests):
        # MBPP's: what the function is called stands in the tests alone.
        question = f"{question.strip()}\n\nYour code should pass these tests:\n\n{tests}"
    elif solution:
        solution = f"{question}{solution}"
    if solution:
        solution = f"```python\n{solution.strip()}\n```"
    return Problem(row.id or default_id, question, solution, tests, "code")


def _ungraded(row: Parts, kind: str, default_id: str) -> Problem:
    """A problem without a right answer; what the row has as one is a reference text."""
    solution, reply = row.solution, row.answer
    if isinstance(reply, list | tuple) and reply:
        reply = reply[0]
    if solution is None and not is_missing(reply):
        solution = str(_checked(reply))
    question = listed(row.question, row.choices) if row.choices else row.question
    return Problem(row.id or default_id, question, solution or "", "", kind, row.choices)


def _checked(answer: Any) -> Any:
    if isinstance(answer, str):
        return text_of({"answer": answer}, "answer", "answer")
    if not isinstance(answer, bool | int | float):
        raise ValueError(f"'answer' is not text but {type(answer).__name__}")
    return answer
