"""The tables of runs of self-distillation: what their numbers are called, and how written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mlx_fd.report.self_reading import SelfRun
from mlx_fd.report.tables import (
    NONE,
    Cell,
    Table,
    TableRow,
    count,
    memory,
    share,
    shown,
    steps_note,
    table,
)
from mlx_fd.runs.labels import duration
from mlx_fd.runs.records.self_distillation import AttemptsRow, SelfHeadroomRow, SelfSummary
from mlx_fd.runs.summary import wilson

STEP_NAMES = {
    "attempt": "attempts",
    "context": "contexts",
    "learn": "student learns",
    "headroom": "held-out problems, before and after",
}
# What makes a method, by option.
_METHOD = {
    "method": "method",
    "context": "context of the self-teacher",
    "objective": "objective",
    "self_teacher": "self-teacher's weights",
    "critic": "critic",
    "on_policy_fraction": "problems that the student answers",
    "expert_answers": "expert's answers trained on",
    "first_tokens": "first tokens of an answer trained on",
    "num_generations": "attempts per problem",
    "gate": "gate",
    "lora_rate": "learning rate",
}
_EXPERTS = ("on_policy_fraction", "expert_answers", "first_tokens")


def lead(run: SelfRun) -> str:
    """What learns by which method, on what."""
    options, manifest = run.options, run.manifest
    role = "expert" if run.has_expert else "critic"
    critic = f", {role} {shown(options['critic'])}" if options.get("critic") else ""
    context = "" if run.has_expert else f"context {shown(options.get('context', 'unknown'))}, "
    sentence = (
        f"model {shown(manifest['student'].get('name', 'unknown'))}{critic}, method "
        f"{shown(options.get('method', 'unknown'))}: {context}objective "
        f"{shown(options.get('objective', 'unknown'))}; problems "
        f"{shown(manifest['problems'].get('name', 'unknown'))}; {len(run.attempts)} attempts"
    )
    return sentence if run.finished else f"{sentence}, unfinished"


def share_says(value: Mapping[str, Any]) -> str:
    """A share in a sentence."""
    return f"{value['right'] / value['n']:.1%}" if value["n"] else NONE


def headlines(run: SelfRun) -> list[tuple[str, Cell]]:
    """What one wants to know of a run first."""
    totals = run.totals
    sides, halves = totals["held_out"], (totals["first_half"], totals["second_half"])
    after, second = share(sides["after"]), share(halves[1])
    found = totals["attempts"]
    graded = [
        (
            "held-out problems right, before → after",
            Cell(f"{share_says(sides['before'])} → {after.value}", after.note),
        ),
        (
            "attempts right, first half → second",
            Cell(f"{share_says(halves[0])} → {second.value}", second.note),
        ),
        (
            "headroom: student right → expert right"
            if run.has_expert
            else "headroom: right without the context → with it",
            _headroom(run),
        ),
    ]
    return [
        *([("right answers", Cell("none are known"))] if is_ungraded(run) else graded),
        (
            "attempts trained on",
            Cell(f"{found['teaches']:.1%}" if found else NONE, f"n {len(run.attempts)}"),
        ),
        ("time", Cell(duration(totals["seconds"]["total"]), memory(totals))),
    ]


def is_ungraded(run: SelfRun) -> bool:
    """Whether the run's problems have no right answers."""
    found = run.totals["attempts"]
    return found is not None and found["right"] is None


def _headroom(run: SelfRun) -> Cell:
    head = run.totals["headroom"]
    if head and "expert" in head and head["right"] is not None:
        n = head["problems"]
        return Cell(f"{head['right'] / n:.1%} → {head['expert'] / n:.1%}", f"n {n}")
    if not run.has_context:
        return Cell(NONE, "no context")
    if not head:
        return Cell(NONE)
    if not (n := head["taught"]):
        return Cell(NONE, "empty context")
    if head["without"] is None or head["with_context"] is None:
        return Cell(NONE, "no right answers are known")
    return Cell(f"{head['without'] / n:.1%} → {head['with_context'] / n:.1%}", f"n {n}")


def _attempts(
    of: Callable[[AttemptsRow], float | None], form: str
) -> Callable[[SelfSummary], Cell]:
    """A statistic of the attempts."""

    def cell(totals: SelfSummary) -> Cell:
        value = of(totals["attempts"]) if totals["attempts"] else None
        return Cell(NONE if value is None else format(value, form))

    return cell


def _health(
    when: Literal["first", "last"], name: Literal["overlap", "reverse_kl"], form: str
) -> Callable[[SelfSummary], Cell]:
    """How near student and teacher are."""

    def cell(totals: SelfSummary) -> Cell:
        found = totals.get("health")
        return Cell(format(found[when][name], form) if found else NONE)

    return cell


def _experts(totals: SelfSummary) -> Cell:
    written = totals.get("expert_answers")
    if not written:
        return Cell(NONE)
    right = written["right"]
    return Cell(
        NONE if right is None else f"{right / written['n']:.1%}",
        f"n {written['n']}, {written['taught']} trained on",
    )


def _cut(totals: SelfSummary) -> Cell:
    value = totals["updates"]["clipped"]
    return Cell(NONE if value is None else f"{value:.2%}")


_SUMMARY: tuple[tuple[str, Callable[[SelfSummary], Cell]], ...] = (
    ("held-out problems right, before", lambda t: share(t["held_out"]["before"])),
    ("held-out problems right, after", lambda t: share(t["held_out"]["after"])),
    ("attempts", lambda t: Cell(count(t["attempts"]["n"] if t["attempts"] else 0))),
    ("attempts right, first half", lambda t: share(t["first_half"])),
    ("attempts right, second half", lambda t: share(t["second_half"])),
    ("expert's answers right", _experts),
    ("attempts trained on", _attempts(lambda a: a["teaches"], ".1%")),
    ("attempts finished", _attempts(lambda a: a["finished"], ".1%")),
    ("tokens per attempt", _attempts(lambda a: a["tokens"], ".1f")),
    ("entropy, nats per token", _attempts(lambda a: a["entropy"], ".4g")),
    ("KL(student, teacher), first quarter", _health("first", "reverse_kl", ".4g")),
    ("KL(student, teacher), last quarter", _health("last", "reverse_kl", ".4g")),
    ("likeliest tokens shared, first quarter", _health("first", "overlap", ".1%")),
    ("likeliest tokens shared, last quarter", _health("last", "overlap", ".1%")),
    (
        "mean absolute token advantage",
        _attempts(lambda a: a["mean_abs_advantage"], ".4g"),
    ),
    (
        "tokens of right attempts with negative advantage",
        _attempts(lambda a: a["negative_on_right"], ".1%"),
    ),
    (
        "maximum log-probability difference, recomputed",
        _attempts(lambda a: a["logprob_gap"], ".2g"),
    ),
    ("optimiser steps", lambda t: Cell(count(t["updates"]["steps"]), steps_note(t["updates"]))),
    ("ratios clipped", _cut),
    ("tokens trained on", lambda t: Cell(count(t["updates"]["tokens"]))),
    ("time", lambda t: Cell(duration(t["seconds"]["total"]))),
    ("peak memory", lambda t: Cell(memory(t).removeprefix("peak memory ") or NONE)),
    ("best checkpoint", lambda t: Cell(str(t.get("best_checkpoint", NONE)))),
)


def summary_table(runs: Sequence[SelfRun]) -> Table:
    """The runs' totals, a column for each."""
    return table(
        "Totals. Percentages have 95 % Wilson intervals.",
        ("", *(run.name for run in runs)),
        [(label, *(of(run.totals) for run in runs)) for label, of in _SUMMARY],
    )


def method_table(runs: Sequence[SelfRun]) -> Table:
    """What was done, a column for each run."""
    rows: list[TableRow] = [
        (label, *(shown(run.options.get(name)) or NONE for run in runs))
        for name, label in _METHOD.items()
        if name not in _EXPERTS or any(run.has_expert for run in runs)
    ]
    return table("The method", ("", *(run.name for run in runs)), rows, numbers=False)


def headroom_table(runs: Sequence[SelfRun]) -> Table | None:
    """Answers with the context against answers without, before the first update."""
    checks = [(run, run.totals["headroom"]) for run in runs]
    if not any(check and check["right"] is not None for _, check in checks):
        return None

    def row(
        label: str, of: Callable[[SelfHeadroomRow], tuple[int | None, int]], with_context: bool
    ) -> TableRow:
        """A line; ``with_context``: of the runs alone whose self-teacher reads a context."""
        return (
            label,
            *(
                _counted(*of(check))
                if check and (run.has_context or not with_context)
                else Cell(NONE)
                for run, check in checks
            ),
        )

    rows: list[TableRow] = [
        row("right, of all held-out problems", lambda h: (h["right"], h["problems"]), False),
        row(
            "both right and wrong attempts, of all held-out problems",
            lambda h: (h["mixed"], h["problems"]),
            False,
        ),
        row(
            "right without the context, of problems with one",
            lambda h: (h["without"], h["taught"]),
            True,
        ),
        row(
            "right with the context, of problems with one",
            lambda h: (h["with_context"], h["taught"]),
            True,
        ),
    ]
    if any(check and "expert" in check for _, check in checks):
        experts = (
            _counted(check["expert"], check["problems"])
            if check and "expert" in check
            else Cell(NONE)
            for _, check in checks
        )
        rows.append(("the expert right, of all held-out problems", *experts))
    return table(
        "Held-out problems, before the first update, with 95 % Wilson intervals.",
        ("", *(run.name for run in runs)),
        rows,
    )


def _counted(right: int | None, n: int) -> Cell:
    if right is None:
        return Cell(NONE)
    return share({"right": right, "n": n, "interval": list(wilson(right, n))})
