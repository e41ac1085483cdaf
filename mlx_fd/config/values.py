"""Whether a value is one that an option takes."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from mlx_fd.config.fields import MAX_FLOAT
from mlx_fd.config.options import Option
from mlx_fd.errors import UserError
from mlx_fd.text import shown

_MAX_DEPTH = 16  # of tables in tables


def suggest(word: str, words: list[str]) -> str:
    """What an error ends in where a word is nearly one of ``words``; else an empty text."""
    close = difflib.get_close_matches(word, words, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def checked(option: Option, value: Any, where: str) -> Any:
    """``value`` as the option's type, within its limits.

    Raises:
        UserError: it is of another type, out of range, or none of the words; ``where`` begins it.
    """

    def wrong(expected: str) -> UserError:
        return UserError(f"{where}: {option.name} must be {expected}, not {shown(value)}.")

    if option.kind is tuple:
        value = _checked_list(option, value, wrong)
    elif option.kind is dict:
        if not isinstance(value, Mapping) or not _is_json(dict(value)):
            raise wrong("a table of numbers, texts, true, false, lists and tables")
        value = dict(value)
    elif option.kind is float:
        if not _is_number(value):
            raise wrong("a finite number")
        value = float(value)
    elif type(value) is not option.kind:
        kind = {bool: "true or false", int: "a whole number", str: "a text"}[option.kind]
        raise wrong(kind)
    elif isinstance(value, str) and not _is_plain(value):
        raise wrong("a text in UTF-8 without control characters")
    if option.choices:
        for word in value if option.kind is tuple else (value,):
            if word not in option.choices:
                hint = suggest(str(word), list(option.choices))
                raise UserError(
                    f"{where}: {option.name} takes {', '.join(option.choices)}, not "
                    f"{shown(word)}{hint}"
                )
    if option.low is not None and value < option.low:
        raise wrong(f"at least {_limit(option.low)}")
    if option.high is not None and value > option.high:
        raise wrong(f"at most {_limit(option.high)}")
    return value


def _checked_list(option: Option, value: Any, wrong: Callable[[str], UserError]) -> tuple[Any, ...]:
    """A list of words, where the option has choices, or of positive numbers."""
    if not isinstance(value, (list, tuple)):
        raise wrong("a list")
    if option.free:
        if not all(isinstance(item, str) and item and _is_plain(item) for item in value):
            raise wrong("a list of names")
        if len(set(value)) != len(value):
            raise wrong("a list without repetitions")
        return tuple(value)
    if not option.choices:
        if not all(_is_number(item) and 0 < item <= MAX_FLOAT for item in value):
            raise wrong("a list of positive numbers")
        return tuple(float(item) for item in value)
    if not value:
        raise wrong(f"a list with at least one of {', '.join(option.choices)}")
    if not all(isinstance(item, str) for item in value):
        raise wrong("a list of words")
    if len(set(value)) != len(value):
        raise wrong("a list without repetitions")
    return tuple(value)


def _is_json(value: Any, depth: int = 0) -> bool:
    """Whether TOML and JSON both have a value: JSON has no dates, and TOML no null."""
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, dict):
        items = [*value, *value.values()]
        return all(isinstance(key, str) for key in value) and _are_json(items, depth)
    if isinstance(value, list):
        return _are_json(value, depth)
    if isinstance(value, str):
        return not any(unicodedata.category(c) == "Cs" for c in value)
    return isinstance(value, bool) or _is_number(value)


def _are_json(values: list[Any], depth: int) -> bool:
    return all(_is_json(value, depth + 1) for value in values)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _is_plain(text: str) -> bool:
    """Whether a text can stand in a file of a run: no part of a path or name has controls."""
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def _limit(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
