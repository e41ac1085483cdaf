"""The report's tables: what a run's numbers are called, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_fd.evaluation.names import is_share, shown_name
from mlx_fd.evaluation.pareto.names import METRICS, remarks_on
from mlx_fd.evaluation.reliability import BINS, judging
from mlx_fd.report.reading import Frontier, LoopRun
from mlx_fd.report.run import Run
from mlx_fd.runs.labels import (
    EXAM_NAMES,
    PART_NAMES,
    STEP_NAMES,
    WORK_NAMES,
    beside_least,
    duration,
    expert_verdicts_say,
)
from mlx_fd.runs.records.cascade import CascadeMeasuredRow
from mlx_fd.runs.records.parts import EstimateRow, ShareRow
from mlx_fd.runs.records.self_distillation import SelfSummary, SelfUpdatesRow
from mlx_fd.runs.records.summary import (
    ExpertUseRow,
    HeadroomRow,
    ScoreGapRow,
    Summary,
    UnreadableRow,
    UpdatesRow,
    VerdictsRow,
)

NONE = "-"


TableRow = Sequence["Cell | str"]


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        value: its text.
        note: an interval, an n, in smaller type.
        strong: whether the value is bold.
        kind: ``good`` or ``bad`` where its colour says so.
        bar: from 0 to 1; a bar of that length of the longest after the value.
    """

    value: str
    note: str = ""
    strong: bool = False
    kind: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: what it shows.
        columns: the columns' heads, the first column's included.
        rows: as many cells each as there are columns.
        numbers: whether the cells after the first are numbers, which stand at the right.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: bool = True


def table(caption: str, columns: Sequence[str], rows: Sequence[TableRow], **options: bool) -> Table:
    """A table of cells and plain strings."""
    cells = tuple(
        tuple(item if isinstance(item, Cell) else Cell(item) for item in row) for row in rows
    )
    return Table(caption, tuple(columns), cells, **options)


def estimate(value: EstimateRow | None, form: str = ".3f", sign: str = "") -> Cell:
    """A number with its 95 % interval and its n."""
    if value is None or value["value"] is None:
        return Cell(NONE)
    text = format(value["value"], f"{sign}{form}")
    if value["low"] is None or value["high"] is None:
        return Cell(text, f"n {value['n']}")
    low, high = (format(side, f"{sign}{form}") for side in (value["low"], value["high"]))
    surely = bool(sign) and (value["low"] > 0 or value["high"] < 0)
    return Cell(text, f"{low} to {high}, n {value['n']}", strong=surely)


def points(value: EstimateRow | None) -> Cell:
    """A difference of two shares, in percentage points: per cent would be of the first share."""
    if value is None:
        return Cell(NONE)
    found = estimate(_in_percent(value), ".1f", "+")
    if found.value == NONE:
        return found
    return replace(found, value=f"{found.value} points")


def _in_percent(value: EstimateRow) -> EstimateRow:
    middle, low, high = (
        None if found is None else 100 * found
        for found in (value["value"], value["low"], value["high"])
    )
    return {"value": middle, "low": low, "high": high, "n": value["n"]}


def share(value: ShareRow) -> Cell:
    """A share that is right, with its interval and its n."""
    if not value["n"]:
        return Cell(NONE)
    low, high = value["interval"]
    return Cell(f"{value['right'] / value['n']:.1%}", f"{low:.1%} to {high:.1%}, n {value['n']}")


def count(value: float | None) -> str:
    """A whole number."""
    return NONE if value is None else f"{value:,.0f}"


def amount(value: float) -> str:
    """A cost, in digits: no power of ten, and no more decimals than one would read."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


def lead(run: LoopRun) -> str:
    """Who teaches whom, on what."""
    expert, student, problems = (
        shown(run.manifest[part].get("name", "unknown"))
        for part in ("expert", "student", "problems")
    )
    sentence = f"expert {expert}, student {student}, problems {problems}; "
    sentence += f"{run.totals['episodes']} episodes"
    return sentence if run.finished else f"{sentence}, unfinished"


def headlines(run: LoopRun) -> list[tuple[str, Cell]]:
    """What one wants to know of a run first."""
    totals = run.totals
    found = [
        ("first answers right", share(totals["accuracy"]["first_answers"])),
        ("final answers right", share(totals["accuracy"]["final_answers"])),
    ]
    if "verdicts" in totals:
        verdicts = totals["verdicts"]
        found = [
            (_GOOD, share(verdicts["first_answers"])),
            (_AGREED, share(verdicts["agreement"])),
        ]
    exam = totals.get("exam", {})
    for name, form in (("first_error_f1", ".1%"), ("solved", ".1%")):
        if name in exam:
            sides = exam[name]
            before = estimate(sides["before"], form).value
            after = estimate(sides["after"], form)
            change = points(sides["change"])
            changed = f"change {change.value}", change.note
            label = (
                "F1 of judging, before → after"
                if name == "first_error_f1"
                else ("problems the student solves, before → after")
            )
            found.append(
                (label, Cell(f"{before} → {after.value}", ", ".join(filter(None, changed))))
            )
    feedback = totals["expert_feedback"]
    found.append(
        (
            "expert feedback skipped",
            Cell(
                f"{feedback['not_asked']} of {totals['episodes']}",
                f"about {count(feedback['tokens_saved'])} tokens saved",
            ),
        )
    )
    found.append(("time", Cell(duration(totals["seconds"]["total"]), memory(totals))))
    return found


def memory(totals: Summary | SelfSummary) -> str:
    """The peak of memory, where it is known."""
    peak = totals.get("peak_memory_bytes")
    return f"peak memory {peak / 2**30:.2f} GiB" if peak else ""


# Of runs whose problems have no right answers.
_GOOD = "first answers good, by the expert's verdict"
_AGREED = "the student's verdict is the expert's"
_BY_VERDICT: tuple[tuple[str, Callable[[VerdictsRow], Cell]], ...] = (
    (_GOOD, lambda v: share(v["first_answers"])),
    (_AGREED, lambda v: share(v["agreement"])),
    ("first answers kept", lambda v: Cell(f"{v['kept']} of {v['kept'] + v['revised']}")),
)
_BY_GOLD: tuple[tuple[str, Callable[[Summary], Cell]], ...] = (
    ("first answers right", lambda t: share(t["accuracy"]["first_answers"])),
    ("final answers right", lambda t: share(t["accuracy"]["final_answers"])),
    (
        "right, expert feedback requested",
        lambda t: share(t["expert_feedback"]["accuracy_when_asked"]),
    ),
    (
        "right, expert feedback skipped",
        lambda t: share(t["expert_feedback"]["accuracy_when_not_asked"]),
    ),
)
_SUMMARY: tuple[tuple[str, Callable[[Summary], Cell]], ...] = (
    ("score gap, first half → second", lambda t: _gap(t["score_gap"])),
    ("optimiser steps", lambda t: Cell(count(t["updates"]["steps"]), steps_note(t["updates"]))),
    ("tokens trained on", lambda t: Cell(count(t["updates"]["tokens"]))),
    ("frozen", lambda t: Cell(_frozen(t["updates"]["frozen_after_batch"]))),
    ("expert feedback requested", lambda t: _asked(t["expert_feedback"])),
    ("unreadable scores", lambda t: _unread(t["unreadable_scores"], t["episodes"])),
    (
        "expert's scores contradicted by gold",
        lambda t: Cell(expert_verdicts_say(t.get("expert_verdicts"))),
    ),
    ("headroom, held-out problems", lambda t: _headroom(t["headroom"])),
    ("time", lambda t: Cell(duration(t["seconds"]["total"]))),
    ("peak memory", lambda t: Cell(memory(t).removeprefix("peak memory ") or NONE)),
    ("best checkpoint", lambda t: Cell(str(t.get("best_checkpoint", NONE)))),
)


def _gap(gap: ScoreGapRow) -> Cell:
    first, second = gap["first_half"], gap["second_half"]
    if first is None or second is None:
        return Cell(NONE)
    return Cell(f"{first:.3f} → {second:.3f}", f"n {gap['n']}")


def steps_note(updates: UpdatesRow | SelfUpdatesRow) -> str:
    """What stands beside the number of optimiser steps."""
    return f"{updates['batches']} batches, {updates['skipped']} skipped"


def _frozen(batch: int | None) -> str:
    return f"after batch {batch}" if batch else "never"


def _asked(feedback: ExpertUseRow) -> Cell:
    of = feedback["asked"] + feedback["not_asked"]
    return Cell(f"{feedback['asked']} of {of}", f"{count(feedback['tokens_written'])} tokens")


def _unread(unread: UnreadableRow, episodes: int) -> Cell:
    return Cell(f"expert {unread['expert']}, student {unread['student']}", f"n {episodes}")


def _headroom(headroom: HeadroomRow | None) -> Cell:
    if headroom is None:
        return Cell(NONE)
    if "verdicts" in headroom:
        expert, student = headroom["verdicts"]["expert"], headroom["verdicts"]["student"]
        return Cell(
            f"good: expert {expert['count']} of {expert['n']}, student {student['count']} of "
            f"{student['n']}",
            "by the expert's verdict",
        )
    return Cell(
        f"right: expert {headroom['expert_right']}, student {headroom['student_right']}",
        f"n {headroom['problems']}",
    )


def summary_table(runs: Sequence[LoopRun]) -> Table:
    """The runs' totals, a column for each."""
    by_verdict = [run for run in runs if "verdicts" in run.totals]
    episodes: TableRow = ("episodes", *(Cell(count(run.totals["episodes"])) for run in runs))
    rows: list[TableRow] = [episodes]
    if len(by_verdict) < len(runs):
        rows += [(label, *(gold(run.totals) for run in runs)) for label, gold in _BY_GOLD]
    if by_verdict:
        rows += [
            (
                label,
                *(
                    verdict(run.totals["verdicts"]) if "verdicts" in run.totals else Cell(NONE)
                    for run in runs
                ),
            )
            for label, verdict in _BY_VERDICT
        ]
    rows += [(label, *(of(run.totals) for run in runs)) for label, of in _SUMMARY]
    no_gold = (
        " Where no right answer is known there are the models' verdicts (a score above 0: good)."
        if by_verdict
        else ""
    )
    return table(
        f"Totals. Percentages have 95 % Wilson intervals.{no_gold}",
        ("", *(run.name for run in runs)),
        rows,
    )


def exam_table(runs: Sequence[LoopRun]) -> Table | None:
    """The examination's measures before and after each run, and the change."""
    names = list(dict.fromkeys(name for run in runs for name in run.totals.get("exam", {})))
    if not names:
        return None
    columns = [
        f"{run.name}: {side}" if len(runs) > 1 else side
        for run in runs
        for side in ("before", "after", "change")
    ]
    rows: list[TableRow] = []
    for name in names:
        cells = []
        for run in runs:
            sides = run.totals.get("exam", {}).get(name)
            cells += [estimate(sides and sides["before"]), estimate(sides and sides["after"])]
            cells.append(estimate(sides and sides["change"], sign="+"))
        rows.append((EXAM_NAMES.get(name, name), *cells))
    return table(
        "With 95 % intervals over the questions; the change is paired, and bold where "
        "the interval excludes 0.",
        ("", *columns),
        rows,
    )


def judging_table(runs: Sequence[LoopRun]) -> Table | None:
    """What the student's scores said of the expert's verdicts: AUC, Brier, calibration curve."""
    found = [(run, scores) for run in runs if (scores := judging(run.episodes))]
    if not found:
        return None
    rows: list[TableRow] = []
    for run, scores in found:
        name = f"{run.name}: " if len(runs) > 1 else ""
        for label, of in (("score head", scores["head"]), ("written score", scores["written"])):
            bins = {round(bin["low"] * BINS): bin for bin in of["curve"]}
            cells = [
                Cell(f"{bin['right']:.0%}", f"n {bin['n']}")
                if (bin := bins.get(at))
                else Cell(NONE)
                for at in range(BINS)
            ]
            figures = [
                Cell(_figures(of["auc"]), _between(of.get("auc_interval"))),
                Cell(_figures(of["brier"]), _between(of.get("brier_interval"), f"n {of['n']}")),
            ]
            rows.append((f"{name}{label}", *figures, *cells))
    return table(
        "The student's scores as verdicts, in the second half of the answers that the expert "
        "scored, before it learned from each: area under the ROC curve and Brier score against the "
        "expert's verdict, with 95 % intervals over answers; and, of "
        "the answers that a score s gives a probability (1 + s) / 2 of being right, the share that "
        "the expert calls right.",
        ("", "AUC", "Brier", *(f"{at / BINS:.1f} to {(at + 1) / BINS:.1f}" for at in range(BINS))),
        rows,
    )


def _between(interval: Sequence[float] | None, *more: str) -> str:
    """An interval, where there is one, and what stands beside it."""
    ends = [" to ".join(map(_figures, interval))] if interval else []
    return ", ".join((*ends, *more))


def probe_table(runs: Sequence[Run]) -> Table | None:
    """Losses on the probe set before and after."""
    names = list(dict.fromkeys(name for run in runs for name in run.totals["probe"]["after"]))
    if not names:
        return None
    rows: list[TableRow] = []
    for name in names:
        cells = []
        for run in runs:
            first = run.totals["probe"]["before"].get(name)
            last = run.totals["probe"]["after"].get(name)
            change = f"{last / first - 1:+.1%}" if first and last is not None else ""
            cells.append(Cell(f"{_figures(first)} → {_figures(last)}", change))
        rows.append((f"{name} loss", *cells))
    return table(
        "Mean losses on the held-out probe problems, before the first update → at the end.",
        ("", *(run.name for run in runs)),
        rows,
    )


def _figures(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def losses_table(runs: Sequence[Run], loss: str) -> Table:
    """A loss on the probe set, by batch: about a dozen points of each curve."""
    curves = [
        {0: run.probe_first.get(loss)}
        | {row["batch"] + 1: row["probe"].get(loss) for row in run.metrics if row["probe"]}
        for run in runs
    ]
    batches = sorted({batch for curve in curves for batch in curve})
    every = max(1, len(batches) // 12)
    shown = sorted({*batches[::every], *batches[-1:]})
    rows: list[TableRow] = [
        (str(batch), *(Cell(_figures(curve.get(batch))) for curve in curves)) for batch in shown
    ]
    return table(
        f"{loss} loss on the held-out problems",
        ("batches done", *(run.name for run in runs)),
        rows,
    )


def decision_table(run: Run) -> Table | None:
    """What the gate said at each look at the probe set; where it said the same, once."""
    rows: list[tuple[str, str, str, str]] = []
    for row in run.metrics:
        stop = row["stop"]
        if not stop:
            continue
        state = "frozen" if row["frozen"] else "learning"
        if rows and rows[-1][1:] == (state, stop["action"], stop["reason"]):
            continue
        rows.append((str(row["batch"] + 1), state, stop["action"], stop["reason"]))
    if not rows:
        return None
    return table(
        "The gate's decisions after each probe evaluation; repeated decisions are left out.",
        ("after batch", "student", "decision", "reason"),
        rows,
        numbers=False,
    )


def steps_table(runs: Sequence[LoopRun]) -> Table:
    """Tokens and seconds by step."""
    kinds = ("generated", "prefilled", "seconds")
    there = dict.fromkeys(step for run in runs for step in run.totals["seconds"])
    # What has no name here is none the less counted.
    steps = [step for step in dict.fromkeys((*STEP_NAMES, *there)) if step in there]
    steps = [step for step in steps if step != "total"]
    rows: list[TableRow] = [
        (
            STEP_NAMES.get(step, step.replace("_", " ")),
            *(cell for run in runs for cell in _amounts(run.totals, step)),
        )
        for step in steps
    ]
    columns = [f"{run.name}: {kind}" if len(runs) > 1 else kind for run in runs for kind in kinds]
    return table("Tokens and seconds by step", ("", *columns), rows)


def work_table(runs: Sequence[LoopRun]) -> Table | None:
    """What was done beside the least there could have been, where it was counted."""
    works = [run.totals.get("work") for run in runs]
    if not any(works):
        return None
    rows: list[TableRow] = [
        (label, *(Cell(beside_least(one["counts"][name])) if one else NONE for one in works))
        for name, label in WORK_NAMES.items()
    ]
    rows += [
        (
            f"seconds: {label}",
            *(Cell(f"{one['seconds'].get(name, 0):,.1f}") if one else NONE for one in works),
        )
        for name, label in PART_NAMES.items()
    ]
    columns = [run.name for run in runs] if len(runs) > 1 else ["done"]
    return table(
        "What the batches did, beside the least there could have been", ("", *columns), rows
    )


def _amounts(totals: Summary, step: str) -> list[Cell]:
    seconds = totals["seconds"].get(step)
    return [
        Cell(count(totals["tokens"].get(step))),
        Cell(count(totals["prefilled"].get(step))),
        Cell(NONE if seconds is None else f"{seconds:,.1f}"),
    ]


def pareto_table(pareto: Frontier) -> Table:
    """Every stopping threshold that was looked at."""
    points = pareto["points"]
    costs = list(dict.fromkeys(name for point in points for name in point["cost"]))
    losses = list(dict.fromkeys(name for point in points for name in point["losses"]))
    metrics = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    columns = [
        "stop_threshold",
        "stops after batch",
        *(name.replace("_", " ") for name in costs),
        *(f"{name} loss" for name in losses),
        *(METRICS[name].full if name in METRICS else name for name in metrics),
        "",
    ]
    rows: list[TableRow] = []
    for point in points:
        stopped = point["stopped_after_batch"]
        rows.append(
            (
                Cell(f"{point['stop_threshold']:g}", strong=point["recommended"]),
                "never" if stopped is None else count(stopped),
                *(amount(point["cost"][n]) if n in point["cost"] else NONE for n in costs),
                *(_figures(point["losses"].get(name)) for name in losses),
                *(estimate(point["metrics"].get(name), ".1%") for name in metrics),
                ", ".join(remark.full for remark in remarks_on(point, pareto)),
            )
        )
    return table("Stopping thresholds, replayed on this run", columns, rows)


def cascade_table(measured: CascadeMeasuredRow) -> Table:
    """A cascade at its threshold, and what it is held against."""
    rows: list[TableRow] = [
        (
            Cell(row["name"], strong=row["name"] == "cascade"),
            estimate(row["accuracy"], ".1%"),
            f"{row['passed_on']:.1%}",
            estimate(row["expert_tokens"], ".1f"),
        )
        for row in measured["systems"]
    ]
    columns = ["", "accuracy", "passed on", "expert tokens per problem"]
    return table("The cascade at its threshold", columns, rows)


def evaluation_says(evaluation: Mapping[str, Any]) -> str:
    """What was evaluated, when and how."""
    sentence = [evaluation["target"], evaluation["created"]]
    temperatures = evaluation["temperature"]
    if "first_answers" in temperatures:
        # Older evaluations do not say.
        by = f" by the {evaluation['answers_by']}" if evaluation["answers_by"] else ""
        sentence.append(f"first answers{by} at temperature {temperatures['first_answers']:g}")
    if "bare" in temperatures:
        sentence.append(f"direct answers at {temperatures['bare']:g}")
    sentence += [f"{key} {evaluation[key]}" for key in ("k", "seed") if evaluation[key] is not None]
    sentence += [f"{kind}: {model}" for kind, model in evaluation["text_models"].items()]
    return ", ".join(sentence)


def measures_of(found: Mapping[str, Any]) -> list[str]:
    """The measures of an evaluation set that some system has a value of."""
    return list(
        dict.fromkeys(
            name
            for system in found["systems"]
            for name, measure in system["measures"].items()
            if measure["value"] is not None
        )
    )


def systems_table(found: Mapping[str, Any]) -> Table:
    """The systems of an evaluation set: measures with intervals."""
    measures = measures_of(found)
    rows: list[TableRow] = [
        (system["label"], *(_measure(name, system["measures"].get(name)) for name in measures))
        for system in found["systems"]
    ]
    return table(
        f"{found['name']}: n = {found['n']}, with 95 % intervals",
        ("", *map(shown_name, measures)),
        rows,
    )


def costs_table(found: Mapping[str, Any]) -> Table | None:
    """What the systems of an evaluation set cost."""
    costs = list(dict.fromkeys(name for system in found["systems"] for name in system["cost"]))
    if not costs:
        return None
    rows: list[TableRow] = [
        (system["label"], *(_cost(system["cost"].get(name)) for name in costs))
        for system in found["systems"]
    ]
    return table(
        "Cost per problem: means with 95 % intervals. Tokens are generated tokens.",
        ("", *(name.replace("_", " ") for name in costs)),
        rows,
    )


def _cost(value: EstimateRow | None) -> Cell:
    """A cost, all three numbers in as many digits as the middle one."""
    large = value is not None and value["value"] is not None and value["value"] >= 1000
    return estimate(value, ",.0f" if large else ",.4g")


def _measure(name: str, value: EstimateRow | None) -> Cell:
    """A measure; per cent where its name says so."""
    if value is None or not is_share(name):
        return estimate(value)
    return estimate(_in_percent(value), ".1f")


def _difference(name: str, value: EstimateRow) -> Cell:
    """A difference of two measures."""
    return points(value) if is_share(name) else estimate(value, sign="+")


def comparisons_table(found: Mapping[str, Any]) -> Table | None:
    """Systems against each other on the same problems."""
    if not found["comparisons"]:
        return None
    labels = {system["name"]: system["label"] for system in found["systems"]}
    rows: list[TableRow] = [
        (
            f"{labels.get(row['system'], row['system'])} against "
            f"{labels.get(row['against'], row['against'])}",
            shown_name(row["measure"]).removesuffix(", %"),
            _difference(row["measure"], row["difference"]),
            _probability(row["p"]),
            _probability(row["p_holm"]),
            row["test"],
        )
        for row in found["comparisons"]
    ]
    return table(
        "Differences on the same problems, bold where the interval excludes 0; p with Holm's "
        "correction over the table.",
        ("", "measure", "difference", "p", "p, Holm", "test"),
        rows,
    )


def _probability(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def options_table(runs: Sequence[Run], *, differing: bool = False) -> Table | None:
    """The runs' options, or only those in which they differ."""
    names = dict.fromkeys(name for run in runs for name in run.manifest["options"])
    rows = []
    for name in names:
        values = [shown(run.manifest["options"].get(name)) for run in runs]
        if not differing or len(set(values)) > 1:
            rows.append((name, *values))
    if not rows:
        return None
    caption = "Options in which the runs differ" if differing else "All options"
    return table(caption, ("", *(run.name for run in runs)), rows, numbers=False)


def origin_table(runs: Sequence[Run], expert: str = "expert") -> Table:
    """Models, data, versions and the machine.

    Args:
        runs: a column each.
        expert: what the larger model is called.
    """

    def of(run: Run, part: str, key: str) -> str:
        return shown(run.manifest[part].get(key))

    rows: list[tuple[str, ...]] = [
        ("directory", *(str(run.folder) for run in runs)),
        ("started", *(run.manifest["created"] or NONE for run in runs)),
    ]
    for part in ("expert", "student", "problems"):
        label = expert if part == "expert" else part
        rows.append((label, *(of(run, part, "name") for run in runs)))
        rows.append((f"{label}, SHA-256", *(of(run, part, "sha256") for run in runs)))
    rows.append(("device", *(of(run, "backend", "device") for run in runs)))
    versions = dict.fromkeys(name for run in runs for name in run.manifest["versions"])
    rows += [(name, *(of(run, "versions", name) for run in runs)) for name in versions]
    return table("Origin of the runs", ("", *(run.name for run in runs)), rows, numbers=False)


def shown(value: Any) -> str:
    """An option's value as text."""
    if value is None or value == "":
        return NONE
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
