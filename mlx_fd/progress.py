"""Where a run stands, and the checkpoints that keep it: what both loops share.

:mod:`mlx_fd.loop` and :mod:`mlx_fd.selfdistill.training` are the loops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from mlx_fd import distill, gate, runs
from mlx_fd.config import Config
from mlx_fd.events import Event, Warned
from mlx_fd.models.student import Student, load_student, read_arrays, save_student

if TYPE_CHECKING:
    from mlx_fd.selfdistill import learning

OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all of a checkpoint but the weights.

    Attributes:
        batch: batches of problems done.
        gate: the gate's state.
        scales: the fixed factor of each loss.
        distilled: batches in which the student learned.
        spent: optimiser steps since the last look at the probe set.
        probe_first: losses on the probe set before the first update.
        probe_last: the same, last time they were looked at.
        best: the least mean of probe losses relative to ``probe_first``.
        best_batch: the batch after which that was.
    """

    batch: int
    gate: gate.GateState
    scales: dict[str, float]
    distilled: int
    spent: int
    probe_first: dict[str, float]
    probe_last: dict[str, float]
    best: float
    best_batch: int

    def to_json(self) -> dict[str, Any]:
        """For ``state.json``."""
        return {**dataclasses.asdict(self), "gate": self.gate.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Progress:
        """What :meth:`to_json` gave."""
        names = [item.name for item in dataclasses.fields(cls)]
        fields = {name: value[name] for name in names}
        return cls(**{**fields, "gate": gate.GateState.from_json(value["gate"])})


def with_probe(progress: Progress, losses: dict[str, float]) -> Progress:
    """The state after a look at the probe set."""
    known = [name for name in losses if progress.probe_first.get(name, 0) > 0]
    if known:
        level = sum(losses[name] / progress.probe_first[name] for name in known) / len(known)
        better = math.isfinite(level) and level < progress.best
    else:
        # Nothing tells the batches apart: the newest has learned the most.
        level, better = progress.best, True
    return dataclasses.replace(
        progress,
        probe_last=losses,
        best=level if better else progress.best,
        best_batch=progress.batch if better else progress.best_batch,
    )


def go_back(folder: Path, report: Callable[[Event], None]) -> runs.Checkpoint | None:
    """Bring a run directory to its newest good checkpoint, and say which ones are not.

    Raises:
        UserError: there are checkpoints and none will do, or the folder cannot be written.
    """
    checkpoint, passed_over = runs.newest_checkpoint(folder)
    for reason in passed_over:
        report(Warned(f"{reason}; going back before it"))
    with runs.explained(folder):
        runs.roll_back(folder, checkpoint)
    return checkpoint


def restore(checkpoint: runs.Checkpoint, student: Student, optimizer: optim.Optimizer) -> Progress:
    """Put a checkpoint's weights and optimiser in place; where the run stood."""
    load_student(student, checkpoint.folder)
    optimizer.state = tree_unflatten(list(read_arrays(checkpoint.folder / OPTIMIZER).items()))
    return Progress.from_json(checkpoint.state)


def save(
    folder: Path,
    progress: Progress,
    config: Config,
    student: Student,
    base: Path,
    optimizer: optim.Optimizer,
    *,
    arrays: Mapping[str, dict[str, mx.array]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint.

    Args:
        folder: the run directory.
        progress: where the run stands.
        config: its configuration.
        student: what was trained.
        base: the folder of the model that the student is made of.
        optimizer: with its state.
        arrays: more arrays, by the names of their files.
        state: more for ``state.json``.
    """

    def write(to: Path) -> None:
        save_student(student, config.models, base, to)
        mx.save_safetensors(str(to / OPTIMIZER), distill.optimizer_arrays(optimizer))
        for name, found in (arrays or {}).items():
            mx.save_safetensors(str(to / name), found)

    sizes = {name: runs.log_size(folder, name) for name in runs.LOGS}
    runs.save_checkpoint(
        folder,
        progress.batch,
        write,
        {**progress.to_json(), **(state or {}), "log_bytes": sizes},
        best=progress.best_batch,
        keep=config.episode.keep_checkpoints,
    )


def finite(value: float) -> float | None:
    """The value, or ``None`` where JSON has no number for it."""
    return value if math.isfinite(value) else None


def update_row(update: distill.Update | learning.Update) -> dict[str, Any]:
    """An optimiser step's part of a line of ``metrics.jsonl``."""
    return {
        "losses": {name: finite(value) for name, value in update.losses.items()},
        "total": finite(update.total),
        "gradient_norm": finite(update.gradient_norm),
        "skipped": update.skipped,
        "tokens": update.tokens,
    }
