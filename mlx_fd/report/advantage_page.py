"""The page of `mlx-fd advantage`: attempts with their tokens coloured by what contexts say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.statistics import Estimate
from mlx_fd.report.rendering import render
from mlx_fd.report.tables import Cell, Table, TableRow, table
from mlx_fd.training.selfdistill.advantage import AFTER, BEFORE, IN, PARTS, RIGHT, Scored, Summary
from mlx_fd.training.selfdistill.contexts import describe

# Advantages in nats from which on a token has the next shade.
SHADES = (0.1, 0.5, 2.0, 5.0)
_WORDS = {
    RIGHT: "in right attempts",
    BEFORE: "before the first wrong step",
    IN: "in it",
    AFTER: "after it",
}
_LEGEND = [
    *((f"a{k}", f"-{SHADES[k - 1]:g} or less") for k in (4, 3, 2, 1)),
    ("", "near 0"),
    *((f"f{k}", f"{SHADES[k - 1]:g} or more") for k in (1, 2, 3, 4)),
]


@dataclass(frozen=True)
class _Token:
    """A token on the page: its text, its shade, and its advantage in nats as text."""

    text: str
    classes: str
    advantage: str


@dataclass(frozen=True)
class _Attempt:
    """An attempt on the page; ``views``: by context its tokens, and the same in words."""

    heading: str
    question: str
    views: list[tuple[str, list[_Token], str]]


def page(target: str, rows: Sequence[Summary], scored: Sequence[Scored]) -> str:
    """The page.

    Args:
        target: the model or run that was looked at.
        rows: the table.
        scored: all attempts, of which some are shown.
    """
    return render(
        "advantage.html",
        styles=("advantage.css",),
        brand="mlx-fd advantage",
        title=f"Per-token advantages of each context: {visible(target)}",
        totals=_table(rows),
        contexts=[(row.context, describe(row.context)) for row in rows],
        legend=_LEGEND,
        attempts=[_attempt(item) for item in chosen(scored)],
    )


def shade(advantage: float) -> str:
    """The class of a token: ``f`` for, ``a`` against, with 1 to 4; empty near 0."""
    level = sum(abs(advantage) >= least for least in SHADES)
    return f"{'f' if advantage > 0 else 'a'}{level}" if level else ""


def visible(piece: str) -> str:
    """A token's text with what cannot be seen made visible; not escaped."""
    return "".join(
        "\u21b5\n" if c == "\n" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for c in piece
    )


def _interval(found: Estimate, form: str) -> Cell:
    if math.isnan(found.value):
        return Cell("n/a")
    if math.isnan(found.low):
        return Cell(format(found.value, form))
    low, high = format(found.low, form), format(found.high, form)
    return Cell(format(found.value, form), f"{low} to {high}")


def _table(rows: Sequence[Summary]) -> Table:
    lines: list[TableRow] = [
        (
            row.context,
            Cell(str(row.attempts or "none"), f"{row.wrong} wrong"),
            *(_interval(row.mean[part], "+.2f") for part in PARTS),
            _interval(row.mass_in, ".0%"),
            Cell("n/a" if math.isnan(row.tokens_in.value) else f"{row.tokens_in.value:.0%}"),
            _interval(row.negative, ".0%"),
        )
        for row in rows
    ]
    return table(
        "Mean advantages in nats, and shares, with 95 % bootstrap intervals over problems",
        (
            "context",
            "attempts",
            *(f"mean {_WORDS[part]}" for part in PARTS),
            "share of |advantage| in the first wrong step",
            "share of tokens in it",
            "right tokens with negative advantage",
        ),
        lines,
    )


def in_words(item: Scored, name: str) -> str:
    """What a context says of an attempt, for those who do not see the colours; not escaped."""
    values = item.advantages[name]
    against = [k for k, value in enumerate(values) if value < -SHADES[0]]
    speaks = [k for k, value in enumerate(values) if value > SHADES[0]]
    sentence = (
        f"{len(values)} tokens, {len(speaks)} with positive advantage, {len(against)} negative"
    )
    if against:
        worst = min(against, key=lambda k: values[k])
        where = "" if item.parts[worst] == RIGHT else f" {_WORDS[item.parts[worst]]}"
        where = " in the first wrong step" if item.parts[worst] == IN else where
        where = " after the first wrong step" if item.parts[worst] == AFTER else where
        piece = item.pieces[worst].strip() or "a line's end"
        sentence += f"; most negative at {piece!r}{where}, {values[worst]:+.1f}"
    return f"{sentence}."


def _attempt(item: Scored) -> _Attempt:
    return _Attempt(
        "A right attempt" if RIGHT in item.parts else "A wrong attempt",
        visible(item.attempt.question),
        [(name, _tokens(item, name), visible(in_words(item, name))) for name in item.advantages],
    )


def _tokens(item: Scored, name: str) -> list[_Token]:
    values = item.advantages[name]
    return [
        _Token(
            visible(piece),
            " ".join(filter(None, (shade(value), "wrong" if part == IN else ""))),
            f"{value:+.2f}",
        )
        for piece, part, value in zip(item.pieces, item.parts, values, strict=True)
    ]


def chosen(scored: Sequence[Scored], wrong: int = 6, right: int = 2) -> list[Scored]:
    """The attempts that are shown: the first ones, each at another problem."""
    found: dict[str, Scored] = {}
    for is_right, most in ((False, wrong), (True, right)):
        fresh = [
            item
            for item in scored
            if (RIGHT in item.parts) == is_right
            and item.advantages
            and item.attempt.problem.id not in found
        ]
        different = {item.attempt.problem.id: item for item in reversed(fresh)}
        first = [item for item in fresh if different[item.attempt.problem.id] is item]
        found |= {item.attempt.problem.id: item for item in first[:most]}
    return list(found.values())
