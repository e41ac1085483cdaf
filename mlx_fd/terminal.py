"""Texts that others wrote, on their way to a terminal or a page."""

from __future__ import annotations


def strip_control_chars(text: str) -> str:
    """A text without the characters that would steer a terminal, or that no file can hold.

    Control characters other than line ends and tabs, escape sequences' first characters among
    them, and lone surrogates become U+FFFD.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
