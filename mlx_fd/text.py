"""Texts that others wrote, on their way to a terminal or a page."""

from __future__ import annotations

from typing import Any


def strip_control_chars(text: str) -> str:
    """A text without the characters that would steer a terminal, or that no file can hold.

    Control characters other than line ends and tabs, escape sequences' first characters among
    them, and lone surrogates become U+FFFD.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


_SHOWN_LENGTH = 80


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= _SHOWN_LENGTH else f"{text[: _SHOWN_LENGTH - 3]}..."
