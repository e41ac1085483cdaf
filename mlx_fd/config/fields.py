"""What an option is made of: a field with its help text and its limits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import field
from typing import Any

MAX_COUNT = 2**31 - 1
"""No option that counts something is larger: indices of arrays are 32-bit integers."""
CONTINUOUS = "continuous"
"""The ``batching`` in which a problem does not wait for the others of its batch."""
MAX_SEED = 2**63 - 1
"""The largest integer that every reader of TOML takes."""
MAX_FLOAT = 3e38  # float32, in which all that is computed with them is, has nothing larger
Words = Collection[str] | Callable[[], Collection[str]]
"""The words that an option takes, a registry for its names, or what gives them when asked."""


def names_of(words: Words) -> tuple[str, ...]:
    """The words as they are now."""
    return tuple(words() if callable(words) else words)


def option(default: Any, help: str, *, choices: Words = (), **limits: Any) -> Any:
    """A field with its help text and its limits (``choices``, ``low``, ``high``).

    Choices that are names in a registry are looked up when they are asked for, so that what is
    registered later than this module is imported is among them.
    """
    metadata = {"help": help, "words": choices, **limits}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)
