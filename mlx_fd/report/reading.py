"""Run directories as the report reads them: whatever is there, and a sentence for what is not."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.choice import promised
from mlx_fd.problems.sources import truth_of
from mlx_fd.report.files import (
    JsonObject,
    counts,
    json_file,
    known,
    log_file,
    number,
    numbers,
    text,
    text_or_none,
    truth,
    truth_or_none,
    whole_or_none,
)
from mlx_fd.report.run import (
    KnownTotals,
    Run,
    best_checkpoint,
    estimate,
    is_finished,
    metric,
    probes_of,
    read_evaluations,
    read_manifest,
    say_changed_logs,
    summary_of,
)
from mlx_fd.report.self_reading import SelfRun, is_self_distillation, read_self_run
from mlx_fd.runs.acceptance import acceptance
from mlx_fd.runs.labels import WORK_NAMES
from mlx_fd.runs.records.cascade import CascadeMeasuredRow
from mlx_fd.runs.records.episodes import (
    AnswerRow,
    EpisodeRow,
    ExpertFeedbackRow,
    GateRow,
    SecondRow,
    StudentFeedbackRow,
    VerdictRow,
)
from mlx_fd.runs.records.metrics import MetricsRow, WorkRow
from mlx_fd.runs.records.parts import BeforeAfterRow, CountRow, EstimateRow
from mlx_fd.runs.records.summary import HeadroomRow, Summary
from mlx_fd.runs.summary import summarise

_PARETO, _CASCADE = "pareto.json", "cascade.json"


class FrontierPoint(TypedDict):
    """What the report shows of a point of ``pareto.json``.

    Attributes:
        stop_threshold: the threshold.
        stopped_after_batch: where it stops; ``None``: it does not.
        cost: by name.
        losses: on the probe set there.
        metrics: further measures, with their intervals.
        dominated: whether another point is at least as good in everything.
        recommended: whether it is the one to take.
    """

    stop_threshold: float
    stopped_after_batch: int | None
    cost: dict[str, float]
    losses: dict[str, float]
    metrics: dict[str, EstimateRow]
    dominated: bool
    recommended: bool


class Frontier(TypedDict):
    """What the report shows of ``pareto.json``.

    Attributes:
        objectives: names, the cost first.
        points: every distinct stop.
        hypervolume: of the frontier.
        knee: threshold at its knee.
        product_rule: threshold by the product rule.
        batches: of the run, when it was made; ``None``: it does not say.
        notes: what there is to know of the recommendation.
    """

    objectives: list[str]
    points: list[FrontierPoint]
    hypervolume: float | None
    knee: float | None
    product_rule: float | None
    batches: int | None
    notes: list[str]


class CascadeShown(TypedDict):
    """What the report shows of ``cascade.json``.

    Attributes:
        promised: the promise in words.
        measured: on the evaluation's problems; before one, on the calibration's.
        held_out: whether it is the evaluation's.
        checkpoint: folder name of the student that was calibrated.
    """

    promised: str
    measured: CascadeMeasuredRow
    held_out: bool
    checkpoint: str


@dataclass(frozen=True)
class LoopRun(Run):
    """A run of the loop.

    Attributes:
        metrics: the rows of ``metrics.jsonl`` that are whole.
        totals: what the rows add up to, with what only ``summary.json`` knows beside it.
        episodes: the rows of ``episodes.jsonl`` that are whole.
        pareto: ``pareto.json``, if there is one.
        warm_up: the distillation before the first batch, if there was one.
        cascade: ``cascade.json``, if there is one.
    """

    metrics: list[MetricsRow]
    totals: Summary
    episodes: list[EpisodeRow]
    pareto: Frontier | None
    warm_up: SelfRun | None = None
    cascade: CascadeShown | None = None


def read_runs(folders: Sequence[Path]) -> list[LoopRun] | list[SelfRun]:
    """Read runs, each once.

    Raises:
        UserError: there is nothing of a run in one of the folders, or some are runs of the loop
            and some of self-distillation.
    """
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in whole:
        _check(folder)
    names = _names(whole)
    kinds = [is_self_distillation(folder) for folder in whole]
    if all(kinds):
        return [read_self_run(*which) for which in zip(whole, names, strict=True)]
    if any(kinds):
        raise UserError(
            f"{whole[kinds.index(True)]} is a run of self-distillation, "
            f"{whole[kinds.index(False)]} one of the loop: they have no numbers to be compared by; "
            "make a page of each."
        )
    return [_read(*which) for which in zip(whole, names, strict=True)]


def _check(folder: Path) -> None:
    files = (runs.MANIFEST, runs.CONFIG, runs.EPISODES, runs.ATTEMPTS, runs.METRICS, runs.SUMMARY)
    if not any((folder / file).is_file() for file in files):
        raise UserError(
            f"{folder}: this is not a run directory (it has none of {', '.join(files)}). Name the "
            "folder that `mlx-fd loop` or `mlx-fd self-distill` printed when it began."
        )
    with contextlib.suppress(OSError, ValueError, RecursionError):
        manifest = json.loads((folder / runs.MANIFEST).read_text(encoding="utf-8"))
        # One that is damaged is left out with a sentence; one of another version is refused.
        if isinstance(manifest, dict) and isinstance(manifest.get("versions"), dict):
            runs.check_schema(folder, manifest)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart."""
    depth = 1
    while True:
        names = [str(Path(*folder.parts[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _why_no_exam(manifest: Mapping[str, Any]) -> str:
    options = manifest.get("options", {})
    if truth_of(str(options.get("problems"))) is not None and not options.get("exam_size"):
        return "none was asked for (exam_size = 0)"
    return "its problems do not come with the truth"


def _read(folder: Path, name: str) -> LoopRun:
    missing: list[str] = []
    manifest = read_manifest(folder, missing)
    episodes = log_file(folder, runs.EPISODES, _episode, missing)
    metrics = log_file(folder, runs.METRICS, _metric, missing)
    say_changed_logs(folder, missing)
    summary = json_file(folder, runs.SUMMARY, _summary, missing, needed=False)
    finished = is_finished(folder, len(episodes), "episodes", missing)
    first, last = probes_of(folder, summary, metrics)
    if metrics and not first:
        missing.append("The losses before the first update are not known any more.")
    headroom = json_file(folder, runs.PROBE, _headroom, missing, needed=False)
    totals = summarise(episodes, metrics, first, last, headroom)
    if summary:
        totals = cast("Summary", {**totals, **summary, "probe": totals["probe"]})
    if accepted := acceptance(episodes):
        totals["acceptance"] = accepted
    if "exam" not in totals and finished:
        missing.append(f"There was no examination: {_why_no_exam(manifest)}.")
    pareto = json_file(folder, _PARETO, _pareto, missing, needed=False)
    if pareto and (pareto["batches"] or len(metrics)) < len(metrics):
        missing.append(
            f"{_PARETO} is of the first {pareto['batches']} of the {len(metrics)} batches; make it "
            f"again: mlx-fd pareto {shlex.quote(str(folder))}."
        )
    warm_up = None
    if (folder / runs.WARM_UP).is_dir():
        warm_up = read_self_run(folder / runs.WARM_UP, name)
        missing += [f"Warm-up: {said}" for said in warm_up.missing]
    cascade = json_file(folder, _CASCADE, _cascade, missing, needed=False)
    best = best_checkpoint(folder)
    if cascade and best and cascade["checkpoint"] != best:
        missing.append(
            f"{_CASCADE} is of checkpoint {cascade['checkpoint']}, and the student is that of "
            f"{best} now: its promise does not hold any more; calibrate again."
        )
    return LoopRun(
        name=name,
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        finished=finished,
        totals=totals,
        probe_first=first,
        evaluations=read_evaluations(folder, missing),
        missing=missing,
        episodes=episodes,
        pareto=pareto,
        warm_up=warm_up,
        cascade=cascade,
    )


class _LoopTotals(KnownTotals):
    """What only ``summary.json`` knows of a run of the loop.

    Attributes:
        exam: each measure before and after.
    """

    exam: NotRequired[dict[str, BeforeAfterRow]]


def _metric(row: JsonObject) -> MetricsRow:
    # Older runs have neither.
    trust = row.get("trust", {})
    found = cast(
        "MetricsRow",
        {
            **metric(row),
            "trust": {
                "threshold": known(trust.get("threshold")),
                "coverage": number(trust.get("coverage", 0)),
                "audited": int(number(trust.get("audited", 0))),
                "disagreed": int(number(trust.get("disagreed", 0))),
                "bound": number(trust.get("bound", 1)),
            },
            "expert_tokens": int(number(row.get("expert_tokens", 0))),
            "expert_verdicts": counts(row.get("expert_verdicts") or {}),
            "answer_temperature": known(row.get("answer_temperature")),
        },
    )
    if "work" in row:
        found["work"] = _work(row["work"])
    return found


def _work(value: Mapping[str, Any]) -> WorkRow:
    return {
        "counts": {
            name: {
                "done": int(number(value["counts"][name]["done"])),
                "least": int(number(value["counts"][name]["least"])),
            }
            for name in WORK_NAMES
        },
        "seconds": numbers(value["seconds"]),
        "processor_seconds": numbers(value["processor_seconds"]),
    }


def _summary(value: JsonObject) -> _LoopTotals:
    found = cast("_LoopTotals", summary_of(value))
    if value.get("exam"):
        found["exam"] = {
            text(name): {
                "before": estimate(sides["before"]),
                "after": estimate(sides["after"]),
                "change": estimate(sides["change"]),
            }
            for name, sides in value["exam"].items()
        }
    return found


def _verdict(row: JsonObject) -> VerdictRow | None:
    if row.get("verdict") is None:
        return None
    again = row["verdict"]["again"]
    return {
        "outcome": text(row["verdict"]["outcome"]),
        "again": None if again is None else _feedback(again),
    }


def _feedback(value: Mapping[str, Any]) -> ExpertFeedbackRow:
    return {"text": text(value["text"]), "written_score": known(value["written_score"])}


def _written(value: Mapping[str, Any]) -> AnswerRow:
    return {"text": text(value["text"]), "final": text_or_none(value["final"])}


def _student_feedback(value: Mapping[str, Any]) -> StudentFeedbackRow:
    return {
        "text": text(value["text"]),
        "head_score": known(value["head_score"]),
        "written_score": known(value["written_score"]),
        # Older runs have neither.
        "solves_alike": known(value.get("solves_alike")),
        "confidence": known(value.get("confidence")),
    }


def _gate(decision: Mapping[str, Any]) -> GateRow:
    return {
        "distilled": truth(decision["distilled"]),
        "reason": text(decision["reason"]),
        "trusted": truth(decision.get("trusted", False)),
        "losses_before": numbers(decision.get("losses_before") or {}),
        "losses_after": numbers(decision.get("losses_after") or {}),
    }


def _second(row: JsonObject) -> SecondRow | None:
    second = row.get("second")
    if second is None:
        return None
    expert = second["expert_feedback"]
    return {
        "answer": _written(second["answer"]),
        "correct": truth_or_none(second["correct"]),
        "expert_feedback": None if expert is None else _feedback(expert),
        "student_feedback": _student_feedback(second["student_feedback"]),
        "gate": _gate(second["gate"]),
        "verdict": _verdict(second),
    }


def _episode(row: JsonObject) -> EpisodeRow:
    expert, student = row["expert_feedback"], row["student_feedback"]
    again = row.get("student_feedback_again")
    found: EpisodeRow = {
        "episode": int(number(row["episode"])),
        "id": str(row["id"]),
        "question": text(row["question"]),
        "reference": text_or_none(row["reference"]),
        "answer": _written(row["answer"]),
        "expert_feedback": None if expert is None else _feedback(expert),
        "student_feedback": _student_feedback(student),
        # Older runs have none.
        "student_feedback_again": None if again is None else _student_feedback(again),
        "gate": _gate(row["gate"]),
        "verdict": _verdict(row),
        "score": known(row["score"]),
        "merged": text(row["merged"]),
        "revised": text(row["revised"]),
        "critique": text(row["critique"]),
        "final": _written(row["final"]),
        "correct_before": truth_or_none(row["correct_before"]),
        "correct_after": truth_or_none(row["correct_after"]),
        "second": _second(row),
        "tokens": counts(row["tokens"]),
        "prefilled": counts(row["prefilled"]),
        "seconds": numbers(row["seconds"]),
        "capped": [text(step) for step in row["capped"]],
    }
    if "expert_solution" in row:
        found["expert_solution"] = _written(row["expert_solution"])
    if "accepted" in row:
        found["accepted"] = counts(row["accepted"])
    return found


def _headroom(value: JsonObject) -> HeadroomRow:
    found = value["headroom"]
    row: HeadroomRow = {
        "problems": int(number(found["problems"])),
        "expert_right": whole_or_none(found["expert_right"]),
        "student_right": whole_or_none(found["student_right"]),
        "expert_judged": int(number(found["expert_judged"])),
        "expert_judged_right": whole_or_none(found["expert_judged_right"]),
        "student_judged": int(number(found["student_judged"])),
        "student_judged_right": whole_or_none(found["student_judged_right"]),
    }
    if "verdicts" in found:
        row["verdicts"] = {
            "expert": _count(found["verdicts"]["expert"]),
            "student": _count(found["verdicts"]["student"]),
            "agreement": _count(found["verdicts"]["agreement"]),
        }
    if "judged" in found:
        judged = found["judged"]
        row["judged"] = {
            "expert_on_wrong": _count(judged["expert_on_wrong"]),
            "expert_on_right": _count(judged["expert_on_right"]),
            "student_on_wrong": _count(judged["student_on_wrong"]),
            "student_on_right": _count(judged["student_on_right"]),
        }
    return row


def _count(value: Mapping[str, Any]) -> CountRow:
    return {"count": int(number(value["count"])), "n": int(number(value["n"]))}


def _pareto(value: JsonObject) -> Frontier:
    return {
        "objectives": [text(name) for name in value["objectives"]],
        "points": [
            {
                "stop_threshold": number(point["stop_threshold"]),
                "stopped_after_batch": whole_or_none(point["stopped_after_batch"]),
                "cost": numbers(point["cost"]),
                "losses": numbers(point["losses"]),
                "metrics": {
                    text(name): estimate(metric)
                    for name, metric in (point.get("estimates") or {}).items()
                },
                "dominated": truth(point["dominated"]),
                "recommended": truth(point["recommended"]),
            }
            for point in value["points"]
        ],
        "hypervolume": known(value.get("hypervolume")),
        "knee": known(value.get("knee")),
        "product_rule": known(value.get("product_rule")),
        "batches": whole_or_none(value.get("batches")),
        "notes": [text(note) for note in value.get("notes") or ()],
    }


def _cascade(value: JsonObject) -> CascadeShown:
    promise, evaluation = value["promise"], value["evaluation"]
    return {
        "promised": promised(
            text(promise["kind"]),
            number(promise["target"]),
            number(promise["level"]),
            known(promise["threshold"]),
            text(value["score"]),
        ),
        "measured": _cascade_measured(evaluation or value["calibration"]),
        "held_out": evaluation is not None,
        "checkpoint": Path(text(value["models"]["adapter"]["name"])).name,
    }


def _cascade_measured(value: JsonObject) -> CascadeMeasuredRow:
    return {
        "problems": text(value["problems"]),
        "n": int(number(value["n"])),
        "created": text(value["created"]),
        "against": int(number(value["against"])),
        "of": int(number(value["of"])),
        "above_random": estimate(value["above_random"]),
        "systems": [
            {
                "name": text(row["name"]),
                "accuracy": estimate(row["accuracy"]),
                "passed_on": number(row["passed_on"]),
                "expert_tokens": estimate(row["expert_tokens"]),
            }
            for row in value["systems"]
        ],
        "curve": [
            {
                "passed_on": number(point["passed_on"]),
                "threshold": known(point["threshold"]),
                "accuracy": number(point["accuracy"]),
                "random": number(point["random"]),
                "oracle": number(point["oracle"]),
                "expert_tokens": number(point["expert_tokens"]),
            }
            for point in value["curve"]
        ],
    }
