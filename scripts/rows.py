"""Rows of a benchmark, one JSON object a line, and how its tables write numbers.

A benchmark adds a row for each of its runs; its tables come from nothing else.
"""

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_fd.evaluation.statistics import Estimate

Row = dict[str, Any]


def latest(file: Path, *names: str) -> dict[tuple[Any, ...], Row]:
    """{key: its last row}, by key; empty where there is no file yet.

    Args:
        file: the rows.
        names: the fields of a row that are its key.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = {tuple(row[name] for name in names): row for row in map(json.loads, lines)}
    return dict(sorted(rows.items()))


def of_arms(file: Path, arms: Iterable[str]) -> dict[str, list[Row]]:
    """{arm: the last row of each seed}, in the order of the arms; without those of no row."""
    rows = latest(file, "arm", "seed")
    found = {arm: [row for key, row in rows.items() if key[0] == arm] for arm in arms}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def add(file: Path, row: Row) -> None:
    """Write a row behind the others."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def made() -> Row:
    """When a row was made, and with which MLX."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "mlx": version("mlx")}


def bits(flags: Iterable[Any]) -> str:
    """Truth values as a text, for a row."""
    return "".join(str(int(bool(flag))) for flag in flags)


def shown(estimate: Estimate, form: str = "+.1f", times: float = 100) -> str:
    """A number, in percent or points if not said otherwise, with its interval.

    A share, which has no sign, is within 0 and 100 %, and so is its interval.
    """
    value, low, high = (times * one for one in (estimate.value, estimate.low, estimate.high))
    if math.isnan(low):
        return f"{value:{form}} ({'the same in each run' if estimate.n > 1 else 'one run'})"
    if times == 100 and not form.startswith("+"):
        low, high = max(low, 0.0), min(high, 100.0)
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def bold(estimate: Estimate, form: str = "+.1f", times: float = 100) -> str:
    """The same, bold where the interval leaves 0 out."""
    text = shown(estimate, form, times)
    return f"**{text}**" if estimate.low > 0 or estimate.high < 0 else text
