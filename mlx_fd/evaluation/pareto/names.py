"""What costs, metrics and points of a frontier are called, in every place that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ACCURACY = "final_accuracy"
# The first is the cost where none is chosen.
COSTS = {
    "expert_tokens": "expert's feedback tokens",
    "kd_steps": "optimiser steps",
    "teacher_tokens": "tokens learned from",
    "seconds": "seconds",
}
KINDS = ("recommended", "on the frontier", "dominated")


class Name(NamedTuple):
    """A name, and what it is where there is little room: in a terminal's columns."""

    full: str
    short: str


METRICS = {
    ACCURACY: Name("final answers right", "right"),
    "first_error_f1": Name("exam: F1 of judging", "exam: F1"),
    "solved": Name("exam: problems solved", "exam: solved"),
}


def kind_of(point: Mapping[str, Any]) -> str:
    """Which of :data:`KINDS` a point of the frontier's file is."""
    return KINDS[0 if point["recommended"] else 2 if point["dominated"] else 1]


def remarks_on(point: Mapping[str, Any], frontier: Mapping[str, Any]) -> list[Name]:
    """What a table says of a point of the frontier's file, beside its numbers."""
    by_product = point["stop_threshold"] == frontier["product_rule"]
    remarks = (
        (Name("recommended", "best"), point["recommended"]),
        (Name("product rule", "product"), by_product),
        (Name("dominated", "dominated"), point["dominated"]),
    )
    return [name for name, holds in remarks if holds]
