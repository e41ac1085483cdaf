"""A row's columns: what each stands for, and its parts as texts.

Names are taken in any case, and as the published data sets have them; chats are
:mod:`mlx_fd.problems.chats`. An image is refused, and a column that is not known is named.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import chats, parsing
from mlx_fd.problems.cells import is_blank, is_empty, utf8
from mlx_fd.problems.choice_columns import choice_columns, choices_of, lettered
from mlx_fd.problems.kinds.choice import listed
from mlx_fd.problems.thoughts import without_thoughts

# Beside these an "answer" may be how one comes to them.
_FINAL = (
    *("final_answer", "expected_answer", "correct_answer", "correct answer", "best_answer"),
    *("best answer", "ground_truth", "gold_answer", "reference_answer"),
)
#: What a column stands for -> the names it is published under, the first of which wins.
COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem", "query", "prompt", "instruction"),
    "context": ("context", "passage", "body", "input"),
    "choices": ("choices", "options"),
    "answer": (
        *_FINAL, "answer", "answerkey", "answers", "answers_spans", "target", "label", "gold",
        "correct_option", "correct", "cop", "output", "response", "completion",
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
# What stands in these talks of the answer, and of others; it is one where it is marked alone.
_TALK = frozenset({"rationale", "explanation"})
# What a row may say beside a question that has no answer.
_ABOUT = frozenset(
    {
        "category", "dataset", "difficulty", "idx", "index", "instance", "lang", "language",
        "level", "license", "meta", "metadata", "prompt_id", "seed_task_id", "source", "split",
        "subject", "tags", "task", "topic", "type", "uid", "unique_id", "url",
        # What mlx-fd serve --keep says of a row.
        "kept", "time",
        # A row's number as pandas writes it.
        "", "unnamed: 0",
    }
)  # fmt: skip
# Answers that stand for "there is none".
_MISSING = frozenset({"", "none", "null", "nan", "n/a"})
# A list of texts, as Python and NumPy write it.
_TEXT_LIST = re.compile(r"\[\s*+['\"].*['\"]\s*+,?\s*+\]", re.DOTALL)
_NO_COMMA = re.compile(r"(?<=[^\s,\[])['\"]\s++['\"](?=[^\s,\]])")
# What is read with other columns.
_BESIDE = frozenset(
    {
        "challenge_test_list", "conversations", "entry_point", "messages", "test_imports",
        "test_setup_code",
    }
)  # fmt: skip


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
class Parts:
    """A row's parts: texts as they stand, the answer as the file has it."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: Any
    solution: str | None
    id: str
    free: bool  # the answer is one of many good ones
    blank: bool  # there is a column for an answer, and nothing in it
    guessed: bool  # the answer is all of a solution that does not mark it
    tests: str  # of a program


def parts_of(row: Mapping[str, Any], named: Mapping[str, str]) -> Parts:
    """A row's parts; ``ValueError`` with the reason where it cannot be read."""
    by_name = _by_name(row)
    columns = _roles(row, by_name, named)
    _refuse_images(row, by_name)
    asked, answer, solution = columns["question"], columns["answer"], columns["solution"]
    tests = _tests(row, by_name, columns["tests"])
    beside = answer is not None or bool(tests or _ANSWERS & by_name.keys())
    if solution is not None and is_blank(row[solution]) and beside:
        solution = None
    if tests:
        # MBPP as first published.
        asked, solution = asked or by_name.get("text"), solution or by_name.get("code")
    worked = None if solution is None else _solution(row, solution)
    reply, guessed = None if answer is None else row[answer], False
    if answer is None and worked is not None and solution is not None:
        # MATH has no other answer than the one in its solution's box.
        marked = "####" in worked or parsing.boxed(worked) is not None
        if marked or solution.strip().lower() not in _TALK:
            reply = worked
            guessed = not (marked or tests or parsing.is_number(parsing.gold_part(worked)))
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
    question = _with_context(row, columns["context"], question)
    in_one = columns["choices"]
    choices, labels = choices_of(row, in_one, {} if in_one else choice_columns(row, reply))
    identity = columns["id"]
    number = None if identity is None or is_empty(row[identity]) else row[identity]
    if isinstance(number, bool | float | list | dict):
        raise ValueError(f"'id' is not text but {type(number).__name__}")
    instance = _value(row, by_name, "instance")
    return Parts(
        question=question,
        choices=choices,
        labels=labels,
        answer=reply,
        solution=worked,
        # GSM-Symbolic's ids are those of templates, each of which has instances.
        id=utf8("-".join(str(part) for part in (number, instance) if not is_empty(part)), "id"),
        free=free,
        blank=is_missing(reply) and (solution is not None or bool(_ANSWERS & by_name.keys())),
        guessed=guessed,
        tests=tests,
    )


def _roles(
    row: Mapping[str, Any], by_name: Mapping[str, str], named: Mapping[str, str]
) -> dict[str, str | None]:
    """The column of each role; one that is named for a role is not looked up for another."""
    free = {name: column for name, column in by_name.items() if column not in named.values()}
    found = {
        role: (named[role] if named[role] in row else None)
        if role in named
        else _column(row, free, role)
        for role in COLUMNS
    }
    context = found["context"]
    asks = context is not None and context.strip().lower() == "input" and "context" not in named
    if asks and found["question"] is None and not _chat(row, by_name):
        # BIG-Bench Hard has nothing but its input.
        found["question"], found["context"] = context, None
    return found


def _solution(row: Mapping[str, Any], column: str) -> str:
    """A worked solution; of several, which OlympiadBench has, the first."""
    value = row[column]
    if isinstance(value, list) and value:
        value = value[0]
    return text_of({column: value}, column, "solution")


def _by_name(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's columns, by their names in lower case."""
    return {name.strip().lower(): name for name in reversed(list(row))}


def _refuse_images(row: Mapping[str, Any], by_name: Mapping[str, str]) -> None:
    for name, original in by_name.items():
        if _IMAGE.fullmatch(name) and not is_empty(row[original]):
            raise ValueError(f"has an image ({original!r}); mlx-fd reads text only")


def _column(row: Mapping[str, Any], by_name: Mapping[str, str], role: str) -> str | None:
    """The first column of a role that holds something."""
    there = ((name, by_name[name]) for name in COLUMNS[role] if name in by_name)
    return next(
        (
            column
            for name, column in there
            # What is blank there may stand in "answer".
            if row[column] is not None
            and not (is_blank(row[column]) and (name in _FINAL or role in ("context", "choices")))
            # Whether a reply is right is no answer.
            and not (name == "correct" and isinstance(row[column], bool))
        ),
        None,
    )


def _with_context(row: Mapping[str, Any], context: str | None, question: str) -> str:
    """A question with what stands before it."""
    if context is None or is_blank(row[context]):
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
    messages = _chat(row, by_name)
    if _value(row, by_name, "tools"):
        raise ValueError("has tools; mlx-fd reads text only")
    return messages if asked is None or reply is None else None


def _chat(row: Mapping[str, Any], by_name: Mapping[str, str]) -> list[Any] | None:
    """The messages of a row, in a column of their own; ShareGPT calls them conversations."""
    found = (_value(row, by_name, name) for name in ("messages", "conversations"))
    return next((one for one in found if isinstance(one, list) and one), None)


def others(row: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """A row's columns that are not known, and that say something."""
    there = {
        name.strip().lower(): name
        for name, value in row.items()
        if not is_blank(value) and value != {}
    }
    by_name = _by_name(row)
    read = _roles(row, by_name, named)
    known = {name for names in COLUMNS.values() for name in names} | _ABOUT | _BESIDE
    if not read["choices"]:
        alone = choice_columns(row, row.get(read["answer"] or ""))
        known |= {name.strip().lower() for name in alone.values()}
    # Of several columns for the same thing one is read.
    second = {
        name
        for role in ("question", "context", "choices", "answer", "solution")
        for name in COLUMNS[role]
        if there.get(name) != read[role]
    }
    return [name for low, name in there.items() if low not in known or low in second]


def text_of(row: Mapping[str, Any], column: str, named: str) -> str:
    """A column's text; ``ValueError`` with the reason where it is none."""
    value = row.get(column)
    if value is None:
        raise ValueError(f"no {named!r}")
    if not isinstance(value, str):
        raise ValueError(f"{named!r} is not text but {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{named!r} is empty")
    return utf8(value, named)


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
    in_one = _column(row, by_name, "choices")
    alone = {} if in_one else choice_columns(row, None) or (lettered(row) if by_letter else {})
    choices, _ = choices_of(row, in_one, alone)
    if choices:
        question = listed(question, choices)
    return question, text_of({"answer": answer}, "answer", "answer")


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


def is_missing(answer: Any) -> bool:
    """Whether an answer says that there is none."""
    if isinstance(answer, str):
        # Of a trace that was cut off within its thought nothing is left.
        return without_thoughts(answer).strip().lower() in _MISSING
    return answer != [] and is_empty(answer)
