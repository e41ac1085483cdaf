"""How a run's student learned, from the files of a run with ``gate = "always"``."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.config import Config, read
from mlx_fd.errors import UserError
from mlx_fd.evaluation.pareto.thresholds import Look
from mlx_fd.runs.checked import ChangedFile, read_checked
from mlx_fd.runs.checkpoints import changed_logs, newest_checkpoint
from mlx_fd.runs.records.summary import Summary


@dataclass(frozen=True)
class BatchCost:
    """What learning from a batch of episodes cost.

    Attributes:
        steps: optimiser steps.
        tokens: tokens that the student read in them.
        seconds: that they took.
        expert_tokens: tokens of the expert's feedbacks.
    """

    steps: int
    tokens: int
    seconds: float
    expert_tokens: int


@dataclass(frozen=True)
class Curve:
    """What a run's files say of how its student learned.

    Attributes:
        config: the run's configuration.
        first: losses on the probe set before the first update.
        last: the same at the run's end, or at its last look where it has not ended.
        looks: the looks between.
        batches: the batches done, in every epoch.
        right: whether each episode's final answer was; ``None`` where nobody knows.
        finished: whether the run came to its end.
    """

    config: Config
    first: dict[str, float]
    last: dict[str, float]
    looks: list[Look]
    batches: list[BatchCost]
    right: list[bool | None]
    finished: bool


def read_curve(folder: Path) -> Curve:
    """The learning curve in a run directory.

    Raises:
        UserError: there is no run, it is none of the loop, its gate was another one, or its files
            are not whole.
    """
    runs.read_manifest(folder)
    config = read(folder / runs.CONFIG)
    if config.self_distils:
        raise UserError(
            f"{folder}: this is a run of mlx-fd {config.command}, whose gate watches one number, "
            "the problems answered wrong, and not losses that are traded off; mlx-fd report draws "
            "it. Stopping thresholds are replayed for runs of mlx-fd loop alone."
        )
    if config.gate.gate != "always":
        raise UserError(
            f"{folder}: this run's gate was {config.gate.gate}, so what comes after a stop cannot "
            f"be seen in it. Make a run that never stops: {_always(folder)}"
        )
    try:
        return _curve(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, ChangedFile) else repr(error)
        raise UserError(
            f"{folder}: its files are not what this mlx-fd writes ({why}). Bring the old ones "
            f"back, or make a new run: {_always(folder)}"
        ) from error


def _always(folder: Path) -> str:
    config, out = folder / runs.CONFIG, folder.with_name(f"{folder.absolute().name}-always")
    quoted = (shlex.quote(str(path)) for path in (config, out))
    return "mlx-fd loop --config {} --gate always --out {}".format(*quoted)


def _curve(folder: Path, config: Config) -> Curve:
    rows, episodes = runs.read_metrics(folder), runs.read_episodes(folder)
    summary_file = folder / runs.SUMMARY
    summary: Summary | None = read_checked(summary_file)[0] if summary_file.exists() else None
    if summary is not None:
        first, last = summary["probe"]["before"], summary["probe"]["after"]
        whole = summary["updates"]["steps"] == sum(len(row["updates"]) for row in rows)
    else:
        checkpoint, _ = newest_checkpoint(folder)
        if checkpoint is None:
            raise UserError(
                f"{folder}: this run has not come to its first checkpoint; continue with: mlx-fd "
                f"resume {shlex.quote(str(folder))}"
            )
        first, last, whole = checkpoint.state["probe_first"], None, True
    begun = math.ceil(len(episodes) / config.generation.batch_size)
    whole = whole and begun <= len(rows) <= begun * config.training.epochs
    numbers = [row["batch"] for row in rows], [row["episode"] for row in episodes]
    whole = whole and not changed_logs(folder)
    if not whole or any(given != list(range(len(given))) for given in numbers):
        raise UserError(
            f"{folder}: lines of {runs.METRICS} or {runs.EPISODES} are missing or damaged. Bring "
            f"the old files back, or make a new run: {_always(folder)}"
        )
    batches, looks = [], []
    spent = 0
    for row in rows:
        updates = row["updates"]
        tokens = sum(int(update["tokens"]) for update in updates)
        written = int(row["expert_tokens"])
        batches.append(BatchCost(len(updates), tokens, _finite(row["distil_seconds"]), written))
        spent += written
        if row["probe"]:
            looks.append(Look(row["batch"] + 1, _losses(row["probe"]), float(spent)))
            spent = 0
    first = {name: value for name, value in _losses(first).items() if name in config.losses.losses}
    if last is None:
        last = looks[-1].losses if looks else first
    right = [row["correct_after"] for row in episodes]
    return Curve(
        config=config,
        first=first,
        last=_losses(last),
        looks=looks,
        batches=batches,
        right=right,
        finished=summary is not None,
    )


def _losses(given: Mapping[str, Any]) -> dict[str, float]:
    return {name: _finite(value) for name, value in given.items()}


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} where a finite number belongs")
    return number
