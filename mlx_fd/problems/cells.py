"""What a cell of a data set holds."""

from __future__ import annotations

import math
from typing import Any


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; NaN is what pandas writes there."""
    return value in (None, "", []) or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing, or white space alone."""
    return is_empty(value) or (isinstance(value, str) and not value.strip())


def utf8(text: str, named: str) -> str:
    """A text that can be written down as it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{named!r} is not UTF-8 text (at character {error.start}); save the file as UTF-8"
        ) from None
    return text
