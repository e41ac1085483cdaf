"""Parts that rows of several files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class ShareRow(TypedDict):
    """A share of right ones.

    Attributes:
        right: how many were right.
        n: of how many.
        interval: 95 % Wilson interval of ``right / n``.
    """

    right: int
    n: int
    interval: list[float]


class EstimateRow(TypedDict):
    """A number with its interval.

    Attributes:
        value: the number; null where it is not defined.
        low: lower end of the 95 % interval; null where it is not known.
        high: upper end.
        n: items that it comes from.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


class BeforeAfterRow(TypedDict):
    """A measure before training and after it.

    Attributes:
        before: before the first update.
        after: at the run's end.
        change: after minus before, paired.
    """

    before: EstimateRow
    after: EstimateRow
    change: EstimateRow


class CountRow(TypedDict):
    """So many of so many.

    Attributes:
        count: how many.
        n: of how many.
    """

    count: int
    n: int


class ProbeLossesRow(TypedDict):
    """Losses on the probe set, by name.

    Attributes:
        before: before the first update.
        after: at the run's end.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]


class ThoughtColumns(TypedDict, total=False):
    """Of models that think before they write; absent where nothing was thought.

    Attributes:
        thoughts: what was thought before a text, by step.
        closed_thoughts: steps whose thought was closed at its token limit.
    """

    thoughts: Mapping[str, str]
    closed_thoughts: list[str]


def thought_columns(thoughts: Mapping[str, str], closed: Sequence[str]) -> ThoughtColumns:
    """The columns of what was thought, and of the steps whose thought was closed."""
    columns: ThoughtColumns = {}
    if thoughts:
        columns["thoughts"] = thoughts
    if closed:
        columns["closed_thoughts"] = list(closed)
    return columns
