"""What `mlx-fd advantage` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.cli.terminal.layout import FittingTable

if TYPE_CHECKING:
    from mlx_fd.evaluation.statistics import Estimate
    from mlx_fd.training.selfdistill.advantage import Summary


def table(rows: Sequence[Summary]) -> FittingTable:
    """Mean advantages of each context."""
    header = (
        *("context", "attempts", "wrong", "right", "before", "in", "after"),
        *("mass in", "against"),
    )
    cells = [
        (
            row.context,
            str(row.attempts or "none"),
            str(row.wrong),
            *(_number(row.mean[part], "+.2f") for part in ("right", "before", "in", "after")),
            f"{_number(row.mass_in, '.0%')} of {_number(row.tokens_in, '.0%')}",
            _number(row.negative, ".0%"),
        )
        for row in rows
    ]
    return FittingTable(header, cells)


def notes(rows: Sequence[Summary]) -> list[str]:
    """What the table's columns mean, and which contexts had no input."""
    silent = ", ".join(row.context for row in rows if not row.attempts)
    return [
        *(
            [f"no attempt gave these contexts any input (more --samples?): {silent}"]
            if silent
            else []
        ),
        "right, before, in, after: mean advantage of the tokens of right attempts, and before, in "
        "and after the first wrong step",
        "mass in: the first wrong step's share of the absolute advantage, and of the tokens; "
        "against: fraction of right tokens with a negative advantage",
    ]


def _number(found: Estimate, form: str) -> str:
    return "n/a" if math.isnan(found.value) else format(found.value, form)
