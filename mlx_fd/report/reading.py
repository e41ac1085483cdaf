"""A run directory as the report reads it: whatever is there, and a sentence for what is not.

A run may be old, unfinished or damaged, and its files may come from anywhere. What does not have
the shape that this version writes is left out, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.summary import summarise

Row = dict[str, Any]
_T = TypeVar("_T")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
_PROBE = "probe.json"
_PARETO = "pareto.json"
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
        episodes: the rows of ``episodes.jsonl`` that are whole.
        metrics: the rows of ``metrics.jsonl`` that are whole.
        finished: whether it came to its end.
        totals: what :func:`mlx_fd.summary.summarise` makes of the rows, with what only
            ``summary.json`` knows (``exam``, ``peak_memory_bytes``, ``best_checkpoint``) beside it.
        probe_first: losses on the probe set before the first update, where they are known.
        pareto: ``pareto.json``, if there is one.
        evaluations: the ``eval.json`` of each suite.
        missing: what is not there or could not be read, in sentences.
    """

    name: str
    folder: Path
    manifest: Row
    episodes: list[Row]
    metrics: list[Row]
    finished: bool
    totals: Row
    probe_first: dict[str, float]
    pareto: Row | None
    evaluations: list[Row]
    missing: list[str]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, each once.

    Raises:
        UserError: there is nothing of a run in one of the folders.
    """
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, name) for folder, name in zip(whole, _names(whole), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart."""
    depth = 1
    while True:
        names = [str(Path(*folder.parts[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _read(folder: Path, name: str) -> Run:
    known = (runs.MANIFEST, runs.CONFIG, runs.EPISODES, runs.METRICS, runs.SUMMARY)
    if not any((folder / file).is_file() for file in known):
        raise UserError(
            f"{folder}: this is no run directory (it has none of {', '.join(known)}). Name the "
            "folder that `mlx-fd loop` printed when it began."
        )
    missing: list[str] = []
    manifest = _json(folder, runs.MANIFEST, _manifest, missing) or _manifest({"options": {}})
    episodes = _log(folder, runs.EPISODES, _episode, missing)
    metrics = _log(folder, runs.METRICS, _metric, missing)
    summary = _json(folder, runs.SUMMARY, _summary, missing, needed=False)
    finished = (folder / runs.SUMMARY).is_file()
    if not finished:
        missing.append(
            f"The run is not finished (it has no {runs.SUMMARY}): its totals are those of the "
            f"{len(episodes)} episodes so far. `mlx-fd resume` goes on with it."
        )
    first, last = _probes(folder, summary, metrics)
    if metrics and not first:
        missing.append("The losses before the first update are not known any more.")
    headroom = _json(folder, _PROBE, _headroom, missing, needed=False) or {}
    totals = summarise(episodes, metrics, first, last, headroom)
    for key in ("exam", "peak_memory_bytes", "best_checkpoint"):
        if summary and key in summary:
            totals[key] = summary[key]
    if "exam" not in totals and finished:
        missing.append("There was no examination: its problems do not come with the truth.")
    return Run(
        name,
        folder,
        manifest,
        episodes,
        metrics,
        finished,
        totals,
        first,
        _json(folder, _PARETO, _pareto, missing, needed=False),
        [
            {**found, "folder": path.parent.name}
            for path in sorted((folder / _EVAL).glob(f"*/{_EVAL_FILE}"))
            if (found := _json(folder, str(path.relative_to(folder)), _evaluation, missing))
        ],
        missing,
    )


def _json(
    folder: Path,
    name: str,
    take: Callable[[Any], _T],
    missing: list[str],
    *,
    needed: bool = True,
) -> _T | None:
    """A JSON file, taken apart; a sentence in ``missing`` where that cannot be done."""
    path = folder / name
    if not path.is_file():
        if needed:
            missing.append(f"{name} is missing.")
        return None
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        missing.append(f"{name} cannot be read: {error.strerror}.")
    except (*_MALFORMED, RecursionError):
        missing.append(f"{name} is damaged, or of another version, and was left out.")
    return None


def _log(folder: Path, name: str, take: Callable[[Row], Row], missing: list[str]) -> list[Row]:
    """The rows of a log that are whole, in their order."""
    path = folder / name
    if not path.is_file():
        missing.append(f"{name} is missing.")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        missing.append(f"{name} cannot be read: {error.strerror}.")
        return []
    rows, lost = [], 0
    for line in filter(None, lines):
        try:
            rows.append(take(json.loads(line)))
        except (*_MALFORMED, RecursionError):
            lost += 1
    if lost:
        missing.append(f"{lost} of {lost + len(rows)} lines of {name} are damaged and left out.")
    if not rows and not lost:
        missing.append(f"{name} is empty.")
    return rows


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError
    return value


def _known(value: Any) -> float | None:
    return None if value is None else _number(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> str | None:
    return None if value is None else _text(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _numbers(value: Any) -> dict[str, float]:
    """Named numbers; those that are not known are left out."""
    return {_text(name): _number(item) for name, item in value.items() if item is not None}


def _written(value: Mapping[str, Any]) -> Row:
    return {"text": _text(value["text"]), "final": _texts(value["final"])}


def _episode(row: Row) -> Row:
    expert, student, decision = row["expert_feedback"], row["student_feedback"], row["gate"]
    return {
        "episode": int(_number(row["episode"])),
        "id": str(row["id"]),
        "question": _text(row["question"]),
        "reference": str(row["reference"]),
        "answer": _written(row["answer"]),
        "expert_feedback": expert
        and {"text": _text(expert["text"]), "score": _known(expert["score"])},
        "student_feedback": {
            "text": _text(student["text"]),
            "score": _number(student["score"]),
            "written_score": _known(student["written_score"]),
        },
        "gate": {
            "distilled": _truth(decision["distilled"]),
            "reason": _text(decision["reason"]),
            "losses_before": _numbers(decision.get("losses_before") or {}),
            "losses_after": _numbers(decision.get("losses_after") or {}),
        },
        "score": _known(row["score"]),
        "merged": _texts(row["merged"]),
        "revised": _texts(row["revised"]),
        "critique": _texts(row["critique"]),
        "final": _written(row["final"]),
        "correct_before": _truth(row["correct_before"]),
        "correct_after": _truth(row["correct_after"]),
        "tokens": _numbers(row["tokens"]),
        "prefilled": _numbers(row.get("prefilled", {})),
        "seconds": _numbers(row["seconds"]),
        "capped": [_text(step) for step in row["capped"]],
    }


def _metric(row: Row) -> Row:
    stop = row["stop"]
    return {
        "batch": int(_number(row["batch"])),
        "lagging": int(_number(row["lagging"])),
        "weights": _numbers(row["weights"]),
        "updates": [
            {
                "losses": _numbers(update["losses"]),
                "skipped": _truth(update["skipped"]),
                "tokens": _number(update.get("tokens", 0)),
            }
            for update in row["updates"]
        ],
        "probe": row["probe"] and _numbers(row["probe"]),
        "stop": stop
        and {
            "action": _text(stop["action"]),
            "reason": _text(stop["reason"]),
            "gains": _numbers(stop["gains"]),
        },
        "frozen": _truth(row["frozen"]),
        "distil_seconds": _number(row.get("distil_seconds", 0.0)),
        "seconds": _number(row["seconds"]),
    }


def _estimate(value: Mapping[str, Any]) -> Row:
    """A number with its interval and its n."""
    found = {name: _known(value[name]) for name in ("value", "low", "high")}
    return {**found, "n": int(_number(value["n"]))}


def _summary(value: Row) -> Row:
    found: Row = {
        "probe": {side: _numbers(value["probe"][side]) for side in ("before", "after")},
    }
    if value.get("exam"):
        found["exam"] = {
            _text(name): {side: _estimate(sides[side]) for side in ("before", "after", "change")}
            for name, sides in value["exam"].items()
        }
    if "peak_memory_bytes" in value:
        found["peak_memory_bytes"] = _number(value["peak_memory_bytes"])
    if "best_checkpoint" in value:
        found["best_checkpoint"] = str(value["best_checkpoint"])
    return found


def _probes(
    folder: Path, summary: Row | None, metrics: Sequence[Row]
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses on the probe set, at first and at last."""
    if summary:
        return summary["probe"]["before"], summary["probe"]["after"]
    last: dict[str, float] = next((row["probe"] for row in reversed(metrics) if row["probe"]), {})
    state = f"{runs.CHECKPOINTS}/last/{runs.STATE}"
    first = _json(folder, state, lambda found: _numbers(found["probe_first"]), [], needed=False)
    return first or {}, last or first or {}


def _headroom(value: Row) -> dict[str, int]:
    return {name: int(count) for name, count in _numbers(value["headroom"]).items()}


def _manifest(value: Row) -> Row:
    parts = {name: value.get(name, {}) for name in _ORIGINS}
    if not isinstance(value["options"], dict) or any(
        not isinstance(p, dict) for p in parts.values()
    ):
        raise TypeError
    return {**parts, "created": str(value.get("created", ""))}


def _pareto(value: Row) -> Row:
    return {
        "objectives": [_text(name) for name in value["objectives"]],
        "points": [
            {
                "stop_threshold": _number(point["stop_threshold"]),
                "stopped_after_batch": _known(point["stopped_after_batch"]),
                "cost": _numbers(point["cost"]),
                "losses": _numbers(point["losses"]),
                "metrics": {
                    _text(name): _estimate(metric)
                    for name, metric in (point.get("estimates") or {}).items()
                },
                "dominated": _truth(point["dominated"]),
                "recommended": _truth(point["recommended"]),
            }
            for point in value["points"]
        ],
        "hypervolume": _known(value.get("hypervolume")),
        "knee": _known(value.get("knee")),
        "product_rule": _known(value.get("product_rule")),
    }


def _evaluation(value: Row) -> Row:
    return {
        "suite": _text(value["suite"]),
        "target": _text(value["target"]),
        "created": _text(value["created"]),
        "seed": value.get("seed"),
        "k": value.get("k"),
        "temperature": _numbers(value.get("temperature") or {}),
        "answers_by": value.get("answers_by"),
        "text_models": {
            _text(kind): _text(model) for kind, model in (value.get("text_models") or {}).items()
        },
        "sets": [
            {
                "name": _text(found["name"]),
                "n": int(_number(found["n"])),
                "systems": [
                    {
                        "name": _text(system["name"]),
                        "label": _text(system["label"]),
                        "measures": {
                            _text(name): _estimate(measure)
                            for name, measure in system["measures"].items()
                        },
                        "cost": {
                            _text(name): _estimate(cost)
                            for name, cost in (system.get("cost_estimates") or {}).items()
                        },
                    }
                    for system in found["systems"]
                ],
                "comparisons": [
                    {
                        **{
                            key: _text(comparison[key])
                            for key in ("measure", "system", "against", "test")
                        },
                        "difference": _estimate(comparison["difference"]),
                        "p": _known(comparison["p"]),
                        "p_holm": _known(comparison["p_holm"]),
                    }
                    for comparison in found.get("comparisons") or []
                ],
            }
            for found in value["sets"]
        ],
    }
