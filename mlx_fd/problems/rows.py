"""Rows of data sets, as people publish them, turned into problems.

What a row holds is told by its columns' names, in any case and with the names that the published
sets use; chats are :mod:`mlx_fd.problems.chats`. What kind of answers they are is told by all rows
together, since one row with ``12`` says nothing. An image is refused, a column that is not known
is named, and a number is never pulled out of a formula.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, chats, parsing
from mlx_fd.problems.kinds import KINDS, is_right, read_final
from mlx_fd.problems.kinds.choice import LETTERS, listed
from mlx_fd.problems.kinds.code import calls_check
from mlx_fd.problems.kinds.text import MAX_TEXT, words_of
from mlx_fd.problems.thoughts import without_thoughts
from mlx_fd.text import shown

# Beside these an "answer" may be how one comes to them.
_FINAL = ("final_answer", "expected_answer")
#: What a column stands for -> the names it is published under, the first of which wins.
COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem", "query", "prompt", "instruction"),
    "context": ("context", "passage", "body", "input"),
    "choices": ("choices", "options"),
    "answer": (
        *_FINAL, "answer", "answerkey", "answers", "answers_spans", "target", "label", "gold",
        "output", "response", "completion",
    ),
    "solution": ("solution", "rationale", "explanation", "canonical_solution"),
    "tests": ("test", "test_list", "tests"),
    "id": ("id", "task_id"),
}  # fmt: skip
_IMAGE = re.compile(
    r"(?:decoded_)?images?(?:_(?:path|url|bytes|\d++))?|imgs?|pictures?|photos?|pixel_values"
)
# What stands in these is one of many good replies, unless it is a number or says what it comes to.
_FREE = frozenset({"output", "response", "completion"})
_ANSWERS = frozenset(COLUMNS["answer"]) - _FREE
# What a row may say beside a question that has no answer.
_ABOUT = frozenset(
    {
        "category", "dataset", "difficulty", "idx", "index", "instance", "lang", "language",
        "level", "license", "meta", "metadata", "prompt_id", "seed_task_id", "source", "split",
        "subject", "tags", "task", "topic", "type", "uid", "unique_id", "url",
        # A row's number as pandas writes it.
        "", "unnamed: 0",
    }
)  # fmt: skip
# Answers that stand for "there is none".
_MISSING = frozenset({"", "none", "null", "nan", "n/a"})
# Of a question that is true or false, or is answered by yes or no.
_TRUTHS = {"yes": ("true",), "true": ("yes",), "no": ("false",), "false": ("no",)}
# A list of texts, as Python and NumPy write it.
_TEXT_LIST = re.compile(r"\[\s*+['\"].*['\"]\s*+,?\s*+\]", re.DOTALL)
_NO_COMMA = re.compile(r"(?<=[^\s,\[])['\"]\s++['\"](?=[^\s,\]])")
# From this share of the rows on they are not bad rows among numbers, but another kind.
_TEXTS, _FORMULAS = 1 / 3, 1 / 10
_FORMULA = re.compile(
    r"[\\^=_{}<>|]|[\d)\]][A-Za-z(\[]|[(\[][^()\[\],]*+,|[A-Za-z]\s?[+*/^]|\d\s?[-+*/]\s?[A-Za-z]\b"
)
# What is read with other columns.
_BESIDE = frozenset(
    {"challenge_test_list", "entry_point", "messages", "test_imports", "test_setup_code"}
)
_CHOICE = re.compile(r"(?P<named>(?:option|choice)[ _]?)?(?P<letter>[a-z])")
_OWN_LETTER = re.compile(r"\s*+\(?([A-Z])[).:]\s*+")


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        columns: what a column stands for (the keys of :data:`COLUMNS`) -> its name in the file.
        kind: of the answers; ``"auto"``: told by the rows.
        skip_bad_rows: count rows that cannot be read instead of refusing all.
    """

    columns: tuple[tuple[str, str], ...] = ()
    kind: str = "auto"
    skip_bad_rows: bool = False


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """``question=problem,answer=solution`` as pairs.

    Raises:
        UserError: it is no such list, or names what no column stands for.
    """
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or role not in COLUMNS:
            raise UserError(
                f"--columns {text}: {part!r} is not one of "
                f"{', '.join(f'{known}=NAME' for known in COLUMNS)}"
            )
        pairs.append((role, name))
    twice = [role for role, count in Counter(role for role, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"--columns {text}: {twice[0]} is there twice")
    return tuple(pairs)


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


@dataclass(frozen=True)
class _Row:
    """A row's parts: texts as they stand, the answer as the file has it."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: Any
    solution: str | None
    id: str
    free: bool  # the answer is one of many good ones
    blank: bool  # there is a column for an answer, and nothing in it
    tests: str  # of a program


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
    taken: list[tuple[str, int, _Row]] = []
    bad: list[tuple[int, BadRow]] = []
    named = dict(reading.columns)
    absent, found, others = set(named.values()), False, dict[str, None]()
    for place, (where, row) in enumerate(rows):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            found = True
            absent -= row.keys()
            others.update(dict.fromkeys(_others(row, named)))
            taken.append((where, place, _parts(row, named)))
        except ValueError as error:
            bad.append((place, BadRow(where, str(error))))
    if absent and found:
        raise UserError(f"--columns: no row has a column {shown(min(absent))}")
    unread = tuple(name for name in others if name not in named.values())
    kind = reading.kind
    if kind == "auto":
        kind = _kind_of([row for _, _, row in taken])
        if kind == "none":
            _check_no_answer_is_missed(taken, unread)
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
    return _problem(_parts(row, {}), kind, "")


def reasons_of(bad: Iterable[BadRow]) -> tuple[tuple[str, int], ...]:
    """Why rows are bad, each with the number of its rows, the most frequent first."""
    return tuple(Counter(row.kind for row in bad).most_common())


# ------------------------------------------------------------------------------------------ columns


def _parts(row: Mapping[str, Any], named: Mapping[str, str]) -> _Row:
    """A row's parts; ``ValueError`` with the reason where it cannot be read."""
    by_name = _by_name(row)

    def column(role: str) -> str | None:
        if role in named:
            return named[role] if named[role] in row else None
        return _column(row, by_name, role)

    _refuse_images(row, by_name)
    asked, answer, solution = column("question"), column("answer"), column("solution")
    tests = _tests(row, by_name, column("tests"))
    beside = answer is not None or bool(tests or _ANSWERS & by_name.keys())
    if solution is not None and _blank(row[solution]) and beside:
        solution = None
    if tests:
        # MBPP as first published.
        asked, solution = asked or by_name.get("text"), solution or by_name.get("code")
    reply = None if answer is None else row[answer]
    if answer is None and solution is not None:
        # MATH has no other answer than the one in its solution's box.
        reply = row[solution]
    reply = _answers_of(reply)
    free = answer is not None and answer.strip().lower() in _FREE
    if (
        answer is not None
        and answer.strip().lower() == "label"
        and isinstance(row[answer], bool)
        and _FREE & by_name.keys()
    ):
        raise ValueError(
            "'label' says whether a reply is good, and is no answer; name the answer "
            "(--columns answer=NAME)"
        )
    chat = _chat_of(row, by_name, asked, reply)
    if chat is not None:
        question, said = chats.read(chat, reply)
        if said is not None and (reply is None or isinstance(reply, list)):
            reply, free = said, True
    elif asked is None:
        raise ValueError("no 'question'")
    else:
        question = text_of(row, asked, "question")
    question = _with_context(row, column("context"), question)
    choices, labels = _choices(
        row, column("choices"), _choice_columns(row, by_letter=_is_letter(reply))
    )
    identity = column("id")
    number = None if identity is None or _empty(row[identity]) else row[identity]
    if isinstance(number, bool | float | list | dict):
        raise ValueError(f"'id' is not text but {type(number).__name__}")
    instance = _value(row, by_name, "instance")
    return _Row(
        question=question,
        choices=choices,
        labels=labels,
        answer=reply,
        solution=None if solution is None else text_of(row, solution, "solution"),
        # GSM-Symbolic's ids are those of templates, each of which has instances.
        id=_utf8("-".join(str(part) for part in (number, instance) if not _empty(part)), "id"),
        free=free,
        blank=_missing(reply) and (solution is not None or bool(_ANSWERS & by_name.keys())),
        tests=tests,
    )


def _by_name(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's columns, by their names in lower case."""
    return {name.strip().lower(): name for name in reversed(list(row))}


def _refuse_images(row: Mapping[str, Any], by_name: Mapping[str, str]) -> None:
    for name, original in by_name.items():
        if _IMAGE.fullmatch(name) and not _empty(row[original]):
            raise ValueError(f"has an image ({original!r}); mlx-fd reads text only")


def _empty(value: Any) -> bool:
    """Whether a cell holds nothing; NaN is what pandas writes there."""
    return value in (None, "", []) or (isinstance(value, float) and math.isnan(value))


def _blank(value: Any) -> bool:
    """Whether a cell holds nothing, or white space alone."""
    return _empty(value) or (isinstance(value, str) and not value.strip())


def _column(row: Mapping[str, Any], by_name: Mapping[str, str], role: str) -> str | None:
    """The first column of a role that holds something."""
    there = ((name, by_name[name]) for name in COLUMNS[role] if name in by_name)
    return next(
        (
            column
            for name, column in there
            # What is blank there may stand in "answer".
            if row[column] is not None and not (name in _FINAL and _blank(row[column]))
        ),
        None,
    )


def _with_context(row: Mapping[str, Any], context: str | None, question: str) -> str:
    """A question with what stands before it."""
    if context is None or not str(row[context]).strip():
        return question
    return f"{text_of(row, context, context).strip()}\n\n{question.strip()}"


def _value(row: Mapping[str, Any], by_name: Mapping[str, str], name: str) -> Any:
    """What a column holds, whatever the case of its name; ``None`` where there is none."""
    return row[by_name[name]] if name in by_name else None


def _tests(row: Mapping[str, Any], by_name: Mapping[str, str], column: str | None) -> str:
    """The tests of a program, as what follows it; empty where there are none."""
    found = None if column is None else row[column]
    if isinstance(found, str) and "assert" in found:  # HumanEval
        entry = _value(row, by_name, "entry_point")
        named = isinstance(entry, str) and entry.isidentifier() and "def check(" in found
        return f"{found.rstrip()}\n\ncheck({entry})" if named else found.rstrip()
    if not isinstance(found, list) or not all(isinstance(t, str) and "assert" in t for t in found):
        return ""
    before = _value(row, by_name, "test_setup_code") or ""
    imports = _value(row, by_name, "test_imports") or []
    lines = [before, *(imports if isinstance(imports, list) else [imports]), *found]
    return "\n".join(str(line).rstrip() for line in lines if line)


def _chat_of(
    row: Mapping[str, Any], by_name: Mapping[str, str], asked: str | None, reply: Any
) -> list[Any] | None:
    """A row's chat: in its question, or in ``messages`` where it has no answer beside them."""
    if asked is not None and isinstance(row[asked], list):
        return list(row[asked])
    messages = _value(row, by_name, "messages")
    if _value(row, by_name, "tools"):
        raise ValueError("has tools; mlx-fd reads text only")
    if isinstance(messages, list) and messages and (asked is None or reply is None):
        return messages
    return None


def _others(row: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """A row's columns that are not known, and that say something."""
    there = {
        name.strip().lower(): name
        for name, value in row.items()
        if not _blank(value) and value != {}
    }
    by_name = _by_name(row)
    read = {role: named.get(role) or _column(row, by_name, role) for role in COLUMNS}
    answer = row.get(read["answer"] or "")
    known = {name for names in COLUMNS.values() for name in names} | _ABOUT | _BESIDE
    known |= {name.strip().lower() for name in _choice_columns(row, by_letter=_is_letter(answer))}
    # Of several columns for the same thing one is read.
    second = {
        name
        for role in ("question", "context", "choices", "answer", "solution")
        for name in COLUMNS[role]
        if there.get(name) != read[role]
    }
    return [name for low, name in there.items() if low not in known or low in second]


def _check_no_answer_is_missed(
    rows: Sequence[tuple[str, int, _Row]], others: Sequence[str]
) -> None:
    """Refuse to take a file for one of prompts where another column may have the answers."""
    if others and not any(row.free for _, _, row in rows):
        raise UserError(
            f"{rows[0][0]}: no row has an answer, and columns that are not read are there: "
            f"{', '.join(map(repr, others))[:200]}; name what they are (--columns answer=NAME), "
            "or say that there are no answers (--answer-kind none)"
        )


def text_of(row: Mapping[str, Any], column: str, named: str) -> str:
    """A column's text; ``ValueError`` with the reason where it is none."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"no {named!r}")
    if not isinstance(value, str):
        raise ValueError(f"{named!r} is not text but {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{named!r} is empty")
    return _utf8(value, named)


def _utf8(text: str, named: str) -> str:
    """A text that can be written down as it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{named!r} is not UTF-8 text (at character {error.start}); save the file as UTF-8"
        ) from None
    return text


def ends_in_letter(answer: Any) -> bool:
    """Whether an answer, or what a whole solution comes to, is a letter by itself."""
    if not isinstance(answer, str):
        return False
    final = parsing.after_mark(answer) or parsing.gold_part(answer)
    return len(letter := final.strip(" *_`().$")) == 1 and letter.isalpha()


def question_and_answer(row: Mapping[str, Any], *, by_letter: bool) -> tuple[str, str]:
    """A question and an answer to it that is to be judged; ``ValueError`` where one is missing.

    Context and choices stand with the question, as where a student learns from such a row.

    Args:
        row: its columns.
        by_letter: columns ``A``, ``B``, ... are choices: letters answer such questions.
    """
    by_name, answer = _by_name(row), row.get("answer")
    _refuse_images(row, by_name)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    asked = "problem" if row.get("question") is None else "question"
    question = _with_context(row, _column(row, by_name, "context"), text_of(row, asked, "question"))
    columns = _choice_columns(row, by_letter=by_letter)
    choices, _ = _choices(row, _column(row, by_name, "choices"), columns)
    if choices:
        question = listed(question, choices)
    return question, text_of({"answer": answer}, "answer", "answer")


def _choice_columns(row: Mapping[str, Any], *, by_letter: bool) -> list[str]:
    """The columns that have a choice each: ``option_a``, ... or, ``by_letter``, ``A``, ..."""
    found: dict[str, str] = {}
    for name, value in row.items():
        match = _CHOICE.fullmatch(name.strip().lower())
        if match and (match["named"] or by_letter) and not _empty(value):
            found.setdefault(match["letter"].upper(), name)
    letters = list(itertools.takewhile(found.__contains__, LETTERS))
    return [found[letter] for letter in letters] if len(letters) > 1 else []


def _answers_of(reply: Any) -> Any:
    """An answer, or the list of them that a cell of a spreadsheet has as text."""
    if not isinstance(reply, str) or not _TEXT_LIST.fullmatch(reply.strip()):
        return reply
    try:
        found = None if _NO_COMMA.search(reply) else ast.literal_eval(reply.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(
            "'answer' looks like a list of texts, but cannot be read as one; write "
            '["Paris", "City of Paris"]'
        )
    return found


def _is_letter(answer: Any) -> bool:
    return isinstance(answer, str) and len(answer.strip()) == 1


def _listed(text: str, column: str) -> Any:
    """The choices of a list that is written as text, as CSV has it."""
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list | tuple | dict):
        raise ValueError(
            f'{column!r} is not a list of choices but text; write ["red", "blue"], or a column '
            "for each (option_a, option_b, ...)"
        )
    return found


def _choices(
    row: Mapping[str, Any], column: str | None, alone: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices of a row, and the labels that its answer may name them by.

    Args:
        row: its columns.
        column: the one with all choices.
        alone: those with one choice each, where there is no such column.
    """
    value = [row[name] for name in alone] if column is None else row[column]
    labels: Sequence[Any] = LETTERS[: len(alone)] if column is None else ()
    column = column or (alone[0] if alone else "choices")
    if isinstance(value, str) and value.strip():
        value = _listed(value, column)
    if isinstance(value, list) and value and all(_is_labelled(choice) for choice in value):
        labels = [choice["label"] for choice in value if "label" in choice]
        value = [choice["text"] for choice in value]
    if isinstance(value, Mapping):
        if set(value) >= {"text", "label"}:  # ARC, CommonsenseQA
            labels, value = value["label"], value["text"]
        else:
            labels, value = list(value), list(value.values())
    if not value:
        return (), ()
    texts = [_choice_text(choice, column) for choice in value]
    if len(texts) > len(LETTERS) or any(not text.strip() for text in texts):
        raise ValueError(f"{column!r} has an empty choice, or more than {len(LETTERS)}")
    own = [_OWN_LETTER.match(text) for text in texts]
    if all(match and match[1] == letter for match, letter in zip(own, LETTERS, strict=False)):
        # AGIEval writes each choice's letter before it.
        texts = [text[match.end() :] for text, match in zip(texts, own, strict=True) if match]
    if labels and len(labels) != len(texts):
        raise ValueError(f"{column!r} has {len(texts)} choices, but {len(labels)} labels")
    return tuple(texts), tuple(_choice_text(label, column) for label in labels)


def _is_labelled(choice: Any) -> bool:
    return isinstance(choice, Mapping) and {"text"} <= set(choice) <= {"text", "label"}


def _choice_text(choice: Any, column: str) -> str:
    if not isinstance(choice, str | int | float) or (_empty(choice) and choice != ""):
        kind = "NaN" if isinstance(choice, float) else type(choice).__name__
        raise ValueError(f"{column!r} has a choice that is not text but {kind}")
    return _utf8(str(choice), column)


# -------------------------------------------------------------------------------------------- kinds


def _missing(answer: Any) -> bool:
    if isinstance(answer, str):
        # Of a trace that was cut off within its thought nothing is left.
        return without_thoughts(answer).strip().lower() in _MISSING
    return answer != [] and _empty(answer)


def _kind_of(rows: Sequence[_Row]) -> str:
    """The kind of all rows: a number is a formula and a text, too, but not the other way round."""
    counts = Counter(_own_kind(row) for row in rows if row.tests or not _missing(row.answer))
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


def _own_kind(row: _Row) -> str:
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


def _check_places(rows: Sequence[_Row]) -> None:
    """Refuse places that count from 1, or are no places: they would mean another choice."""
    places = [
        (row.answer, [text.strip() for text in row.choices])
        for row in rows
        if row.choices and isinstance(row.answer, int) and not isinstance(row.answer, bool)
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


def _problem(row: _Row, kind: str, default_id: str) -> Problem:
    answer = row.answer
    also: tuple[str, ...] = ()
    if not KINDS[kind].graded:
        return _ungraded(row, kind, default_id)
    if kind == "code":
        return _program(row, default_id)
    if _missing(answer):
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


def _program(row: _Row, default_id: str) -> Problem:
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


def _ungraded(row: _Row, kind: str, default_id: str) -> Problem:
    """A problem without a right answer; what the row has as one is a reference text."""
    solution, reply = row.solution, row.answer
    if isinstance(reply, list | tuple) and reply:
        reply = reply[0]
    if solution is None and not _missing(reply):
        solution = str(_checked(reply))
    question = listed(row.question, row.choices) if row.choices else row.question
    return Problem(row.id or default_id, question, solution or "", "", kind, row.choices)


def _checked(answer: Any) -> Any:
    if isinstance(answer, str):
        return text_of({"answer": answer}, "answer", "answer")
    if not isinstance(answer, bool | int | float):
        raise ValueError(f"'answer' is not text but {type(answer).__name__}")
    return answer
