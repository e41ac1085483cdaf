"""Files of a run directory, which may be old, cut short or somebody's: taken apart, never trusted.

What does not have the shape that this version writes is left out, and a sentence says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mlx_fd.runs.checked import read_checked

JsonObject = dict[str, Any]
_T = TypeVar("_T")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


def json_file(
    folder: Path,
    name: str,
    take: Callable[[Any], _T],
    missing: list[str],
    *,
    needed: bool = True,
) -> _T | None:
    """A JSON file, taken apart; a sentence in ``missing`` where that cannot be done."""
    path = folder / name
    if not path.is_file():
        if needed:
            missing.append(f"{name} is missing.")
        return None
    try:
        return take(read_checked(path)[0])
    except OSError as error:
        missing.append(f"{name} cannot be read: {error.strerror}.")
    except (*_MALFORMED, RecursionError):
        missing.append(f"{name} is damaged, or of another version, and was left out.")
    return None


def log_file(
    folder: Path, name: str, take: Callable[[JsonObject], _T], missing: list[str]
) -> list[_T]:
    """The rows of a log that are whole, in their order."""
    path = folder / name
    if not path.is_file():
        missing.append(f"{name} is missing.")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        missing.append(f"{name} cannot be read: {error.strerror}.")
        return []
    rows, lost = [], 0
    for line in filter(None, lines):
        try:
            rows.append(take(json.loads(line)))
        except (*_MALFORMED, RecursionError):
            lost += 1
    if lost:
        missing.append(f"{lost} of {lost + len(rows)} lines of {name} are damaged and left out.")
    if not rows and not lost:
        missing.append(f"{name} is empty.")
    return rows


def number(value: Any) -> float:
    """A finite number, or ``TypeError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError
    return value


def known(value: Any) -> float | None:
    """A finite number or ``None``."""
    return None if value is None else number(value)


def text(value: Any) -> str:
    """A string, or ``TypeError``."""
    if not isinstance(value, str):
        raise TypeError
    return value


def text_or_none(value: Any) -> str | None:
    """A string or ``None``."""
    return None if value is None else text(value)


def truth(value: Any) -> bool:
    """True or false, or ``TypeError``."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def truth_or_none(value: Any) -> bool | None:
    """True, false or ``None``."""
    return None if value is None else truth(value)


def whole_or_none(value: Any) -> int | None:
    """A whole number or ``None``."""
    return None if value is None else int(number(value))


def counts(value: Any) -> dict[str, int]:
    """Named whole numbers."""
    return {text(name): int(number(item)) for name, item in value.items()}


def numbers(value: Any) -> dict[str, float]:
    """Named numbers; those that are not known are left out."""
    return {text(name): number(item) for name, item in value.items() if item is not None}
