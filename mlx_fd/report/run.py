"""What the runs of both kinds have: the loop's, and self-distillation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mlx_fd import runs
from mlx_fd.report.files import JsonObject, json_file, known, number, numbers, text, truth
from mlx_fd.runs.checkpoints import changed_logs
from mlx_fd.runs.records.metrics import BatchMetricsRow
from mlx_fd.runs.records.parts import EstimateRow, ProbeLossesRow
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.records.summary import Summary

_EVAL = "eval"
_EVAL_FILE = "eval.json"
# The parts of a manifest that are tables themselves.
_ORIGINS = ("expert", "student", "problems", "backend", "versions", "options")


@dataclass(frozen=True)
class Run:
    """What there is of a run.

    Attributes:
        name: what the page calls it; no other run on the page has the same.
        folder: its directory.
        manifest: tables of ``manifest.json``, empty where it could not be read, and ``created``.
        metrics: the rows of ``metrics.jsonl`` that are whole.
        finished: whether it came to its end.
        totals: what the rows add up to, with what only ``summary.json`` knows beside it.
        probe_first: losses on the probe set before the first update, where they are known.
        evaluations: the ``eval.json`` of each suite.
        missing: what is not there or could not be read, in sentences.
    """

    name: str
    folder: Path
    manifest: JsonObject
    metrics: Sequence[BatchMetricsRow]
    finished: bool
    totals: Summary | SelfSummary
    probe_first: Mapping[str, float]
    evaluations: list[JsonObject]
    missing: list[str]


def read_manifest(folder: Path, missing: list[str]) -> JsonObject:
    """``manifest.json``, or empty tables in its place."""
    return json_file(folder, runs.MANIFEST, _manifest, missing) or _manifest({"options": {}})


def read_evaluations(folder: Path, missing: list[str]) -> list[JsonObject]:
    """What ``mlx-fd eval`` left in a run."""
    evaluations = [
        {**found, "folder": path.parent.name}
        for path in sorted((folder / _EVAL).glob(f"*/{_EVAL_FILE}"))
        if (found := json_file(folder, str(path.relative_to(folder)), _evaluation, missing))
    ]
    best = best_checkpoint(folder)
    for found in evaluations:
        # One that was named stands in the folder's name.
        if best and found["checkpoint"] not in ("", best, *found["folder"].split("-")):
            missing.append(
                f"{_EVAL}/{found['folder']} is of checkpoint {found['checkpoint']}, and the "
                f"student is that of {best} now: evaluate it again."
            )
    return evaluations


def best_checkpoint(folder: Path) -> str:
    """Folder name of a run's best checkpoint; empty where that cannot be told.

    In a copy that followed links ``best`` is a folder, which does not say whose weights it has.
    """
    name = (folder / runs.CHECKPOINTS / "best").resolve().name
    return name if name.isdigit() else ""


def is_finished(folder: Path, rows: int, called: str, missing: list[str]) -> bool:
    """Whether a run came to its end; a sentence in ``missing`` where it did not."""
    if (folder / runs.SUMMARY).is_file():
        return True
    missing.append(
        f"The run is not finished (it has no {runs.SUMMARY}): its totals are those of the "
        f"{rows} {called} so far. `mlx-fd resume` goes on with it."
    )
    return False


def say_changed_logs(folder: Path, missing: list[str]) -> None:
    """A sentence for each log that is not what the run wrote."""
    missing += [
        f"{name} is not what the run wrote: something changed it since, and numbers from it may be "
        "wrong."
        for name in changed_logs(folder)
    ]


class KnownTotals(TypedDict):
    """What only ``summary.json`` knows of a run of either kind.

    Attributes:
        probe: losses on the probe set, before and after.
        peak_memory_bytes: most memory of MLX.
        seconds: seconds by step.
        best_checkpoint: its name.
    """

    probe: ProbeLossesRow
    peak_memory_bytes: NotRequired[float]
    seconds: NotRequired[dict[str, float]]
    best_checkpoint: NotRequired[str]


def summary_of(value: JsonObject) -> KnownTotals:
    """What only ``summary.json`` knows of a run of either kind."""
    found: KnownTotals = {
        "probe": {
            "before": numbers(value["probe"]["before"]),
            "after": numbers(value["probe"]["after"]),
        },
    }
    if "peak_memory_bytes" in value:
        found["peak_memory_bytes"] = number(value["peak_memory_bytes"])
    if "seconds" in value:
        # With what was done beside the batches.
        found["seconds"] = numbers(value["seconds"])
    if "best_checkpoint" in value:
        found["best_checkpoint"] = str(value["best_checkpoint"])
    return found


def probes_of(
    folder: Path, summary: KnownTotals | None, metrics: Sequence[BatchMetricsRow]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Losses on the probe set, at first and at last."""
    if summary:
        return summary["probe"]["before"], summary["probe"]["after"]
    probes = [probe for row in metrics if (probe := row["probe"])]
    last = probes[-1] if probes else {}
    state = f"{runs.CHECKPOINTS}/last/{runs.STATE}"
    first = json_file(folder, state, lambda found: numbers(found["probe_first"]), [], needed=False)
    return first or {}, last or first or {}


def metric(row: JsonObject) -> BatchMetricsRow:
    """A row of ``metrics.jsonl``: what those of both kinds of run have."""
    stop = row["stop"]
    return {
        "batch": int(number(row["batch"])),
        "lagging": int(number(row["lagging"])),
        "weights": numbers(row["weights"]),
        "updates": [
            {
                "losses": numbers(update["losses"]),
                "total": known(update["total"]),
                "gradient_norm": known(update["gradient_norm"]),
                "skipped": truth(update["skipped"]),
                "tokens": int(number(update["tokens"])),
            }
            for update in row["updates"]
        ],
        "probe": row["probe"] and numbers(row["probe"]),
        "stop": stop
        and {
            "action": text(stop["action"]),
            "reason": text(stop["reason"]),
            "gains": numbers(stop["gains"]),
            "weights": numbers(stop["weights"]),
        },
        "frozen": truth(row["frozen"]),
        "distil_seconds": number(row["distil_seconds"]),
        "seconds": number(row["seconds"]),
    }


def estimate(value: Mapping[str, Any]) -> EstimateRow:
    """A number with its interval and its n."""
    return {
        "value": known(value["value"]),
        "low": known(value["low"]),
        "high": known(value["high"]),
        "n": int(number(value["n"])),
    }


def _manifest(value: JsonObject) -> JsonObject:
    parts = {name: value.get(name, {}) for name in _ORIGINS}
    if not isinstance(value["options"], dict) or any(
        not isinstance(p, dict) for p in parts.values()
    ):
        raise TypeError
    return {**parts, "created": str(value.get("created", ""))}


def _evaluation(value: JsonObject) -> JsonObject:
    return {
        "suite": text(value["suite"]),
        "target": text(value["target"]),
        "created": text(value["created"]),
        "checkpoint": Path(text((value["models"].get("adapter") or {}).get("name", ""))).name,
        "seed": value.get("seed"),
        "k": value.get("k"),
        "temperature": numbers(value.get("temperature") or {}),
        "answers_by": value.get("answers_by"),
        "text_models": {
            text(kind): text(model) for kind, model in (value.get("text_models") or {}).items()
        },
        "sets": [
            {
                "name": text(found["name"]),
                "n": int(number(found["n"])),
                "systems": [
                    {
                        "name": text(system["name"]),
                        "label": text(system["label"]),
                        "measures": {
                            text(name): estimate(measure)
                            for name, measure in system["measures"].items()
                        },
                        "cost": {
                            text(name): estimate(cost)
                            for name, cost in (system.get("cost_estimates") or {}).items()
                        },
                    }
                    for system in found["systems"]
                ],
                "comparisons": [
                    {
                        **{
                            key: text(comparison[key])
                            for key in ("measure", "system", "against", "test")
                        },
                        "difference": estimate(comparison["difference"]),
                        "p": known(comparison["p"]),
                        "p_holm": known(comparison["p_holm"]),
                    }
                    for comparison in found.get("comparisons") or []
                ],
            }
            for found in value["sets"]
        ],
    }
