"""How many random inputs the tests draw: a part of them by day, all of them each night."""

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")

#: Set by .github/workflows/nightly.yml.
ALL = bool(os.environ.get("MLX_FD_ALL_DRAWS"))


def draws(number: int) -> int:
    """How many of this number of random inputs a test tries now: the first fifth, or all."""
    return number if ALL else max(number // 5, 100)


def by_day(cases: Iterable[T], every: int = 2) -> list[T]:
    """The cases that a test tries now: one of so many, from the first on, or all."""
    return list(cases)[:: 1 if ALL else every]


#: Minutes of training that few changes touch.
nightly = pytest.mark.skipif(not ALL, reason="runs each night (MLX_FD_ALL_DRAWS=1)")
