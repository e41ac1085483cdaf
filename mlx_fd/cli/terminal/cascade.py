"""A cascade as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fd.cli.terminal.layout import FittingTable
from mlx_fd.evaluation.cascade.choice import promised, ways_out
from mlx_fd.runs.records.cascade import CascadeFile, CascadeMeasuredRow, CascadePromiseRow

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
    if value["low"] is None:
        return format(value["value"], form)
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
    shown = measured or found["calibration"]
    area = f"area above a lottery, over all shares: {_interval(shown['above_random'], '+.3f')}"
    where = "on other problems" if measured else "on the calibration's own problems"
    came = _came(promise, shown, where)
    lines = [said, came, f"{area}, n {shown['n']}"]
    if left_out := shown.get("left_out"):
        lines.append(f"problems left out, since the threshold was set on them: {left_out}")
    return "\n".join(lines)


def _came(promise: CascadePromiseRow, shown: CascadeMeasuredRow, where: str) -> str:
    """What came of a promise."""
    against, of = shown["against"], shown["of"]
    if promise["threshold"] is None and promise["kind"] == "risk":
        return _nothing_kept(promise)
    if not of:
        return f"{where} the student kept no answer, so that none could be wrong"
    accuracy = promise["kind"] == "accuracy"
    share = 1 - against / of if accuracy else against / of
    keeps = share >= promise["target"] if accuracy else share <= promise["target"]
    right = of - against if accuracy else against
    return f"{where} it was {share:.1%} ({right} of {of}): {'kept' if keeps else 'not kept'}"


def _nothing_kept(promise: CascadePromiseRow) -> str:
    """Why a student keeps nothing, and what would help."""
    said = "no threshold surely keeps this promise, so that the student keeps no answer"
    ways = ways_out(promise)
    return f"{said}: {ways}" if ways else said
