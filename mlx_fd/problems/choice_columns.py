"""The choices that a row's columns hold: in one of them as a list, or in one each."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_fd.problems.cells import is_blank, is_empty, utf8
from mlx_fd.problems.kinds.choice import LETTERS

# MedMCQA has opa to opd.
_NAMED = re.compile(r"(?:option|choice|op)[ _]?(?P<label>[a-z]|\d)")
_PLACES = "0123456789"
_OWN_LETTER = re.compile(r"\s*+\(?([A-Z])[).:]\s*+")
# Of fewer letters nobody knows: "a" and "b" may be the numbers of a sum.
_SURELY = 3


def choice_columns(row: Mapping[str, Any], answer: Any) -> dict[str, str]:
    """The columns that have a choice each, by label: ``option_a``, ``choice1``, or ``A``, ...

    Letters by themselves are choices where the answer is one of them, or what stands in one.

    Raises:
        ValueError: they must be choices, and the answer is none of them.
    """
    named = {
        match["label"].upper(): name
        for name in reversed(list(row))
        if not is_empty(row[name]) and (match := _NAMED.fullmatch(name.strip().lower()))
    }
    for labels in (LETTERS, _PLACES, _PLACES[1:]):
        if len(found := _from_the_first(named, labels)) > 1:
            return found
    found = lettered(row)
    texts = {str(row[name]).strip() for name in found.values()}
    if is_letter(answer) or (not is_blank(answer) and str(answer).strip() in texts):
        return found
    if len(found) < _SURELY or not all(name.strip().isupper() for name in found.values()):
        return {}
    # A place from 0, as in a list of choices; or nobody says which is right.
    if is_blank(answer) or (isinstance(answer, int) and not isinstance(answer, bool)):
        return found
    raise ValueError(
        f"columns {', '.join(found.values())} look like choices, but the answer is neither the "
        "letter nor the text of one; correct it, or give the columns other names"
    )


def lettered(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns whose names are letters from A on, two at least, that hold something."""
    there = {name.strip().upper(): name for name in reversed(list(row)) if not is_empty(row[name])}
    found = _from_the_first(there, LETTERS)
    return found if len(found) > 1 else {}


def _from_the_first(there: Mapping[str, str], labels: Iterable[str]) -> dict[str, str]:
    return {label: there[label] for label in itertools.takewhile(there.__contains__, labels)}


def is_letter(answer: Any) -> bool:
    """Whether an answer is one character."""
    return isinstance(answer, str) and len(answer.strip()) == 1


def choices_of(
    row: Mapping[str, Any], column: str | None, alone: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices of a row, and the labels that its answer may name them by.

    Args:
        row: its columns.
        column: the one with all choices.
        alone: those with one choice each, by label, where there is no such column.

    Raises:
        ValueError: they cannot be read.
    """
    if column is None:
        column = next(iter(alone.values()), "choices")
        value, labels = [row[name] for name in alone.values()], list(alone)
    else:
        value, labels = _all_in_one(row[column], column)
    if is_blank(value):
        return (), ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{column!r} is not a list of choices but {type(value).__name__}")
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


def _all_in_one(value: Any, column: str) -> tuple[Any, list[Any]]:
    """The choices of one cell and their labels, which may be none."""
    if isinstance(value, str) and value.strip():
        value = _listed(value, column)
    if isinstance(value, list) and value and all(_is_labelled(choice) for choice in value):
        labels = [choice["label"] for choice in value if "label" in choice]
        return [choice["text"] for choice in value], labels
    if not isinstance(value, Mapping):
        return value, []
    if not set(value) >= {"text", "label"}:
        # Parquet gives all rows the labels of all.
        value = {label: text for label, text in value.items() if text is not None}
        return list(value.values()), list(value)
    # ARC, CommonsenseQA
    if not isinstance(value["label"], list):
        raise ValueError(f"{column!r} has labels that are no list")
    return value["text"], value["label"]


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


def _is_labelled(choice: Any) -> bool:
    return isinstance(choice, Mapping) and {"text"} <= set(choice) <= {"text", "label"}


def _choice_text(choice: Any, column: str) -> str:
    if not isinstance(choice, str | int | float) or (is_empty(choice) and choice != ""):
        kind = "NaN" if isinstance(choice, float) else type(choice).__name__
        raise ValueError(f"{column!r} has a choice that is not text but {kind}")
    return utf8(str(choice), column)
