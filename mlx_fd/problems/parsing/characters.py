"""Characters as models write them, their twins in ASCII, and a pattern's last match in them."""

from __future__ import annotations

import re
import unicodedata
from collections import deque

NARROW = "\u202f"  # what every space that may stand inside a number becomes
_TWINS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    **dict.fromkeys("\u00a0\u2007\u2009\u202f", NARROW),
    **dict.fromkeys("\u2028\u2029\u0085", "\n"),
    "\u066a": "%",
    "\u066b": ".",
    "\u066c": ",",
}


class _Plain(dict[int, str]):
    """Table for ``str.translate``: ASCII twins of digits, signs, spaces and wide letters.

    One character stays one character, so that a place in the result is a place in the original.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        twin = _TWINS.get(char, char)
        if code >= 0x80 and char not in _TWINS:
            kind = unicodedata.category(char)
            if kind == "Nd":
                twin = str(unicodedata.decimal(char))
            elif 0xFF01 <= code <= 0xFF5E:
                twin = chr(code - 0xFEE0)
            else:
                twin = {"Zs": " ", "Cf": " ", "Sc": "$"}.get(kind, char)
        self[code] = twin
        return twin


PLAIN = _Plain()


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last place where a pattern matches."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
