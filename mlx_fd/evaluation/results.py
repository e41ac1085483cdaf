"""What the rows of a set of an evaluation add up to: measures, comparisons and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mlx_fd.evaluation.measures import Known, Measure, compare
from mlx_fd.evaluation.statistics import Estimate, bootstrap, holm, mean
from mlx_fd.evaluation.suites import Set
from mlx_fd.runs.records.evaluation import (
    ComparisonRow,
    CostsRow,
    EvaluationSetRow,
    OutputRow,
    PairRow,
)


def results_of(one: Set, by_system: dict[str, list[list[OutputRow]]]) -> EvaluationSetRow:
    """What the rows of a set add up to.

    Args:
        one: the set.
        by_system: the rows of each system: of each item, its samples.
    """
    measures: dict[str, dict[str, Measure | Known]] = {
        system: {measure.name: measure for measure in [*one.measures(rows), _cut(rows)]}
        for system, rows in by_system.items()
    }
    return {
        "name": one.name,
        "n": len(one.items),
        "systems": [
            {
                "name": system,
                "label": one.label(system),
                "measures": {
                    name: measure.estimate().to_json() for name, measure in measures[system].items()
                },
                **_costs(rows),
            }
            for system, rows in by_system.items()
        ],
        "comparisons": _comparisons(measures),
    }


def _cut(rows: Sequence[Sequence[OutputRow]]) -> Measure:
    """The share of trials in which some text ended at its token limit."""
    return Measure(
        "cut", [float(np.mean([bool(row["capped"]) for row in samples])) for samples in rows]
    )


def _comparisons(measures: dict[str, dict[str, Measure | Known]]) -> list[ComparisonRow]:
    """The first system against each other one; p corrected over all of them."""
    compared = {
        system: {
            name: one for name, one in by_name.items() if isinstance(one, Measure) and one.compared
        }
        for system, by_name in measures.items()
    }
    ours, *others = compared
    comparisons: list[PairRow] = [
        {
            "measure": name,
            "system": ours,
            "against": other,
            **compare(measure, compared[other][name]),
        }
        for name, measure in compared[ours].items()
        for other in others
    ]
    corrected = holm([float("nan") if row["p"] is None else row["p"] for row in comparisons])
    return [
        {**row, "p_holm": None if np.isnan(p) else p}
        for row, p in zip(comparisons, corrected, strict=True)
    ]


def _costs(rows: Sequence[Sequence[OutputRow]]) -> CostsRow:
    """Tokens and seconds of one attempt, as means over problems; ``cost`` has them bare."""

    def column(of: Callable[[OutputRow], float]) -> Estimate:
        return bootstrap([[float(np.mean([of(row) for row in samples])) for samples in rows]], mean)

    def written(who: str) -> Callable[[OutputRow], float]:
        return lambda row: sum(n for step, n in row["tokens"].items() if row["by"][step] == who)

    def read_by_expert(row: OutputRow) -> float:
        return sum(n for step, n in row["prefilled"].items() if row["by"][step] == "expert")

    costs = {
        "tokens": column(lambda row: sum(row["tokens"].values())),
        "expert_tokens": column(written("expert")),
        "student_tokens": column(written("student")),
        "prefilled": column(lambda row: sum(row["prefilled"].values())),
        "expert_prefilled": column(read_by_expert),
        "seconds": column(lambda row: sum(row["seconds"].values())),
    }
    return {
        "cost": {name: round(estimate.value, 4) for name, estimate in costs.items()},
        "cost_estimates": {name: estimate.to_json() for name, estimate in costs.items()},
    }
