"""Texts that others wrote, on their way to a terminal or a page."""

from __future__ import annotations

import re
from typing import Any

# Control characters but tabs and line ends, with which escape sequences begin; halves of surrogate
# pairs, which no file can hold; and what turns the direction of the text after it, which may then
# say something else than what was written.
_UNSAFE = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"
)


def strip_control_chars(text: str) -> str:
    """A text without the characters that would steer a terminal, or that no page can hold.

    Control characters other than line ends and tabs, what turns the direction of writing, and lone
    surrogates become U+FFFD.
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


_SHOWN_LENGTH = 80


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."
