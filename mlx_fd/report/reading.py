"""Run directories as the report reads them: whatever is there, and a sentence for what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.problems.sources import truth_of
from mlx_fd.report.files import (
    Row,
    json_file,
    known,
    log_file,
    number,
    numbers,
    text,
    text_or_none,
    truth,
)
from mlx_fd.report.run import (
    Run,
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
from mlx_fd.runs.summary import summarise

_PROBE = "probe.json"
_PARETO = "pareto.json"


@dataclass(frozen=True)
class LoopRun(Run):
    """A run of the loop.

    Attributes:
        episodes: the rows of ``episodes.jsonl`` that are whole.
        pareto: ``pareto.json``, if there is one.
    """

    episodes: list[Row]
    pareto: Row | None


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
            f"{folder}: this is no run directory (it has none of {', '.join(files)}). Name the "
            "folder that `mlx-fd loop` or `mlx-fd self-distill` printed when it began."
        )


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
    metrics = log_file(folder, runs.METRICS, metric, missing)
    say_changed_logs(folder, missing)
    summary = json_file(folder, runs.SUMMARY, _summary, missing, needed=False)
    finished = is_finished(folder, len(episodes), "episodes", missing)
    first, last = probes_of(folder, summary, metrics)
    if metrics and not first:
        missing.append("The losses before the first update are not known any more.")
    headroom = json_file(folder, _PROBE, _headroom, missing, needed=False) or {}
    totals = summarise(episodes, metrics, first, last, headroom) | {
        key: value for key, value in (summary or {}).items() if key != "probe"
    }
    if "exam" not in totals and finished:
        missing.append(f"There was no examination: {_why_no_exam(manifest)}.")
    pareto = json_file(folder, _PARETO, _pareto, missing, needed=False)
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
    )


def _summary(value: Row) -> Row:
    found = summary_of(value)
    if value.get("exam"):
        found["exam"] = {
            text(name): {side: estimate(sides[side]) for side in ("before", "after", "change")}
            for name, sides in value["exam"].items()
        }
    return found


def _written(value: Mapping[str, Any]) -> Row:
    return {"text": text(value["text"]), "final": text_or_none(value["final"])}


def _episode(row: Row) -> Row:
    expert, student, decision = row["expert_feedback"], row["student_feedback"], row["gate"]
    return {
        "episode": int(number(row["episode"])),
        "id": str(row["id"]),
        "question": text(row["question"]),
        "reference": str(row["reference"]),
        "answer": _written(row["answer"]),
        "expert_feedback": expert
        and {"text": text(expert["text"]), "score": known(expert["score"])},
        "student_feedback": {
            "text": text(student["text"]),
            "score": number(student["score"]),
            "written_score": known(student["written_score"]),
        },
        "gate": {
            "distilled": truth(decision["distilled"]),
            "reason": text(decision["reason"]),
            "losses_before": numbers(decision.get("losses_before") or {}),
            "losses_after": numbers(decision.get("losses_after") or {}),
        },
        "score": known(row["score"]),
        "merged": text_or_none(row["merged"]),
        "revised": text_or_none(row["revised"]),
        "critique": text_or_none(row["critique"]),
        "final": _written(row["final"]),
        "correct_before": truth(row["correct_before"]),
        "correct_after": truth(row["correct_after"]),
        "tokens": numbers(row["tokens"]),
        "prefilled": numbers(row.get("prefilled", {})),
        "seconds": numbers(row["seconds"]),
        "capped": [text(step) for step in row["capped"]],
    }


def _headroom(value: Row) -> dict[str, int]:
    return {name: int(count) for name, count in numbers(value["headroom"]).items()}


def _pareto(value: Row) -> Row:
    return {
        "objectives": [text(name) for name in value["objectives"]],
        "points": [
            {
                "stop_threshold": number(point["stop_threshold"]),
                "stopped_after_batch": known(point["stopped_after_batch"]),
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
    }
