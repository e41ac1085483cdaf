"""A cascade as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fd.cli.terminal.layout import FittingTable
from mlx_fd.evaluation.cascade.choice import promised
from mlx_fd.runs.records import CascadeFile, CascadeMeasuredRow

_NAMES = {
    "student": "the student alone",
    "cascade": "the cascade",
    "random": "as many passed on by lot",
    "oracle": "as many by an oracle",
    "expert": "the expert alone",
}


def table(measured: CascadeMeasuredRow) -> FittingTable:
    """The cascade at its threshold, and what it is held against, a row each."""
    header = ["", "right", "passed on", "expert tokens per problem"]
    rows = [
        [
            _NAMES[row["name"]],
            _interval(row["accuracy"], ".1%"),
            f"{row['passed_on']:.1%}",
            _interval(row["expert_tokens"], ".1f"),
        ]
        for row in measured["systems"]
    ]
    return FittingTable(header, rows, styles={1: "bold"})


def _interval(value: Mapping[str, Any], form: str) -> str:
    if value["value"] is None:
        return "-"
    low, high = (format(value[side], form) for side in ("low", "high"))
    return f"{value['value']:{form}} ({low} to {high})"


def summary(found: CascadeFile) -> str:
    """What was promised, and what came of it on other problems."""
    promise, measured = found["promise"], found["evaluation"]
    said = promised(
        promise["kind"],
        promise["target"],
        promise["level"],
        promise["threshold"],
        found["score"],
    )
    lines = [said]
    shown = measured or found["calibration"]
    against, of = shown["against"], shown["of"]
    accuracy = promise["kind"] == "accuracy"
    share = (against / of if of else 0.0) if not accuracy else 1 - against / of
    where = "on other problems" if measured else "on the calibration's own problems"
    keeps = share >= promise["target"] if accuracy else share <= promise["target"]
    right = of - against if accuracy else against
    lines.append(f"{where} it was {share:.1%} ({right} of {of}): {'kept' if keeps else 'not kept'}")
    area = shown["above_random"]
    lines.append(
        f"area above a lottery, over all shares: {_interval(area, '+.3f')}, n {shown['n']}"
    )
    return "\n".join(lines)
