"""A run of self-distillation as the report reads it: attempts, and the headroom before them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mlx_fd import runs
from mlx_fd.report.files import (
    JsonObject,
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
    Run,
    is_finished,
    metric,
    probes_of,
    read_evaluations,
    read_manifest,
    say_changed_logs,
    summary_of,
)
from mlx_fd.runs.records.self_distillation import (
    AttemptRow,
    HealthRow,
    SelfHeadroomRow,
    SelfMetricsRow,
    SelfSummary,
)
from mlx_fd.runs.self_distillation_summary import WRONG, summarise

_STEPS = ("attempt", "context", "learn")


@dataclass(frozen=True)
class SelfRun(Run):
    """A run of self-distillation.

    Attributes:
        metrics: the rows of ``metrics.jsonl`` that are whole.
        totals: what the rows add up to, with what only ``summary.json`` knows beside it.
        attempts: the rows of ``attempts.jsonl`` that are whole.
    """

    metrics: list[SelfMetricsRow]
    totals: SelfSummary
    attempts: list[AttemptRow]

    @property
    def options(self) -> JsonObject:
        """The run's options, as far as they are known."""
        found: JsonObject = self.manifest["options"]
        return found

    @property
    def has_expert(self) -> bool:
        """Whether the teacher is another model: a run of ``mlx-fd distil``."""
        return self.options.get("self_teacher") == "expert"

    @property
    def has_context(self) -> bool:
        """Whether the self-teacher reads more than the problem."""
        return self.options.get("context") != "none"


def is_self_distillation(folder: Path) -> bool:
    """Whether a run is one of self-distillation, by its files or else by its options."""
    if (folder / runs.ATTEMPTS).is_file() or (folder / runs.HEADROOM).is_file():
        return True
    try:
        manifest = json.loads((folder / runs.MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["options"].get("method"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def read_self_run(folder: Path, name: str) -> SelfRun:
    """Read a run of self-distillation."""
    missing: list[str] = []
    manifest = read_manifest(folder, missing)
    attempts = log_file(folder, runs.ATTEMPTS, _attempt, missing)
    metrics = log_file(folder, runs.METRICS, _metric, missing)
    say_changed_logs(folder, missing)
    headroom = json_file(folder, runs.HEADROOM, _headroom, missing)
    summary = json_file(folder, runs.SUMMARY, summary_of, missing, needed=False)
    finished = is_finished(folder, len(attempts), "attempts", missing)
    first, last = map(_shares, probes_of(folder, summary, metrics))
    if headroom and headroom["right"] is not None and not first:
        first = {WRONG: 1 - headroom["right"] / headroom["problems"]}
        last = last or first
    size = headroom["problems"] if headroom else 0
    totals = summarise(attempts, metrics, first, last, size, headroom)
    if summary:
        totals = cast("SelfSummary", {**totals, **summary, "probe": totals["probe"]})
    return SelfRun(
        name=name,
        folder=folder,
        manifest=manifest,
        metrics=metrics,
        finished=finished,
        totals=totals,
        probe_first=first,
        evaluations=read_evaluations(folder, missing),
        missing=missing,
        attempts=attempts,
    )


def _attempt(row: JsonObject) -> AttemptRow:
    found: AttemptRow = {
        "attempt": int(number(row["attempt"])),
        "id": str(row["id"]),
        "question": text(row["question"]),
        "reference": text_or_none(row["reference"]),
        "text": text(row["text"]),
        "tokens": [int(number(token)) for token in row["tokens"]],
        "final": text_or_none(row["final"]),
        "correct": truth_or_none(row["correct"]),
        "finished": truth(row["finished"]),
        "teacher": text_or_none(row["teacher"]),
        "note": text(row["note"]),
        "wrong": int(number(row["wrong"])),
        "teaches": truth(row["teaches"]),
        "reward": known(row["reward"]),
        "group_advantage": known(row["group_advantage"]),
        "mean_abs_advantage": known(row["mean_abs_advantage"]),
        "negative_advantage": known(row["negative_advantage"]),
        "entropy": known(row["entropy"]),
        "logprob": known(row["logprob"]),
        "logprob_gap": number(row["logprob_gap"]),
    }
    if "by_expert" in row:
        found["by_expert"] = truth(row["by_expert"])
    return found


def _metric(row: JsonObject) -> SelfMetricsRow:
    found = row["attempts"]
    usual = metric(row)
    rest = {
        **usual,
        "probe": usual["probe"] and _shares(usual["probe"]),
        "attempts": {
            "n": int(number(found["n"])),
            "right": whole_or_none(found["right"]),
            "reward": known(found["reward"]),
            "teaches": known(found["teaches"]),
            "finished": known(found["finished"]),
            "tokens": known(found["tokens"]),
            "entropy": known(found["entropy"]),
            "mean_abs_advantage": known(found["mean_abs_advantage"]),
            "negative_on_right": known(found["negative_on_right"]),
            "logprob_gap": known(found["logprob_gap"]),
        },
        "clipped": [number(share) for share in row["clipped"]],
        "prefilled": int(number(row["prefilled"])),
        "step_seconds": {step: number(row["step_seconds"][step]) for step in _STEPS},
    }
    read = cast("SelfMetricsRow", rest)
    if "expert_answers" in row:
        written = numbers(row["expert_answers"])
        read["expert_answers"] = {
            "n": int(written["n"]),
            "right": whole_or_none(row["expert_answers"]["right"]),
            "taught": int(written["taught"]),
        }
    if "health" in row:
        read["health"] = _health(row["health"])
    return read


def _health(row: JsonObject) -> HealthRow:
    found: HealthRow = {
        "top_k": int(number(row["top_k"])),
        "tokens": int(number(row["tokens"])),
        "overlap": number(row["overlap"]),
        "reverse_kl": number(row["reverse_kl"]),
        "positions": [
            {
                "first": int(number(place["first"])),
                "tokens": int(number(place["tokens"])),
                "reverse_kl": number(place["reverse_kl"]),
            }
            for place in row["positions"]
        ],
    }
    if min(found["tokens"], *(place["tokens"] for place in found["positions"])) < 1:
        raise ValueError
    return found


def _headroom(value: JsonObject) -> SelfHeadroomRow:
    if value["right"] is None:
        return {
            "problems": int(number(value["problems"])),
            "right": None,
            "mixed": None,
            "taught": int(number(value["taught"])),
            "without": None,
            "with_context": None,
        }
    names = ("problems", "right", "mixed", "taught", "without", "with_context")
    found = {name: int(numbers(value)[name]) for name in names}
    of_all, of_taught = ("right", "mixed", "taught"), ("without", "with_context")
    if found["problems"] < 1 or not (
        all(0 <= found[name] <= found["problems"] for name in of_all)
        and all(0 <= found[name] <= found["taught"] for name in of_taught)
    ):
        raise ValueError
    row: SelfHeadroomRow = {
        "problems": found["problems"],
        "right": found["right"],
        "mixed": found["mixed"],
        "taught": found["taught"],
        "without": found["without"],
        "with_context": found["with_context"],
    }
    if "expert" in value:
        row["expert"] = int(numbers(value)["expert"])
        if not 0 <= row["expert"] <= row["problems"]:
            raise ValueError
    return row


def _shares(losses: Mapping[str, float]) -> dict[str, float]:
    """Without what can be no share of the held-out problems."""
    return {name: value for name, value in losses.items() if 0 <= value <= 1}
