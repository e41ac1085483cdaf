"""What both loops share: where a run stands, its checkpoints, and the way from batch to batch.

:mod:`mlx_fd.training.loop` and :mod:`mlx_fd.training.selfdistill.training` are the loops. Each of
them calls, in this order, :func:`go_back`, :func:`begin_or_restore`, :func:`run_batches` and
:func:`write_summary`, and says itself what a batch is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.feedback import distill, gate
from mlx_fd.feedback.risk import Trust
from mlx_fd.files import write_json
from mlx_fd.models import ranks
from mlx_fd.models.student import Student, load_student, read_arrays, save_student
from mlx_fd.runs.checked import ChangedFile, content_digest, read_checked, with_digest
from mlx_fd.runs.checkpoints import (
    Checkpoint,
    check_nothing_lost,
    newest_checkpoint,
    roll_back,
    save_checkpoint,
)
from mlx_fd.runs.events import BatchDone, Event, Note, Warned
from mlx_fd.runs.logs import Log
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.metrics import MetricsRow, StopRow, TrustRow, UpdateRow
from mlx_fd.runs.records.self_distillation import AttemptRow, SelfMetricsRow, SelfSummary
from mlx_fd.runs.records.summary import Summary
from mlx_fd.training.answering import Answering
from mlx_fd.training.replay import Replay

OPTIMIZER = "optimizer.safetensors"
Kept = TypeVar("Kept")
AnySummary = TypeVar("AnySummary", Summary, SelfSummary)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: all of a checkpoint but the weights.

    Attributes:
        batch: batches of problems done.
        gate: the gate's state.
        scales: the fixed factor of each loss.
        distilled: batches in which the student learned.
        spent: what was spent since the last probe evaluation: tokens of the expert's feedbacks; in
            self-distillation, where no expert writes, optimiser steps.
        probe_first: losses on the probe set before the first update.
        probe_last: the same, last time they were looked at.
        best: the least mean of probe losses relative to ``probe_first``.
        best_batch: the batch after which that was.
        replay: what is remembered of the samples so far.
        answering: how the answers that were judged have been.
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
    replay: Replay = dataclasses.field(default_factory=Replay)
    answering: Answering = dataclasses.field(default_factory=Answering)

    def to_json(self) -> dict[str, Any]:
        """For ``state.json``."""
        parts = {"gate": self.gate.to_json(), "replay": self.replay.to_json()}
        return {**dataclasses.asdict(self), **parts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        """What :meth:`to_json` gave."""
        parts = ("gate", "replay", "answering")
        names = [item.name for item in dataclasses.fields(cls) if item.name not in parts]
        return cls(
            **{name: value[name] for name in names},
            gate=gate.GateState.from_json(value["gate"]),
            # Older runs have none of these.
            replay=Replay.from_json(value["replay"]) if "replay" in value else Replay(),
            answering=Answering(**value.get("answering", {})),
        )


def with_probe(state: RunState, losses: dict[str, float], *, kept: bool = True) -> RunState:
    """The state after a probe evaluation.

    Args:
        state: before it.
        losses: on the probe set.
        kept: whether a checkpoint can be written of the student as it is; only then it can be the
            best one.
    """
    if not kept:
        return dataclasses.replace(state, probe_last=losses)
    known = [name for name in losses if name in state.probe_first]
    level = state.best
    if known:
        level = sum(_level(losses[name], state.probe_first[name]) for name in known) / len(known)
    # Where nothing tells two batches apart, the newer one has learned more.
    better = not known or (math.isfinite(level) and level <= state.best)
    return dataclasses.replace(
        state,
        probe_last=losses,
        best=level if better else state.best,
        best_batch=state.batch if better else state.best_batch,
    )


def _level(loss: float, first: float) -> float:
    """Where a loss stands, 1 at its first value: what was nothing at first can only rise."""
    return loss / first if first > 0 else 1 + loss


@dataclass(frozen=True)
class Records:
    """What a run writes as it goes on, and what was measured before this process.

    Attributes:
        folder: the run directory.
        logs: its logs by their files' names.
        peak_before: most memory, in bytes, that MLX had in the processes that made what is there.
        cut: where what is cut or replaced goes; made when there is something.
    """

    folder: Path
    logs: Mapping[str, Log]
    peak_before: int
    cut: Path

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to a log."""
        self.logs[name].append(rows)

    def peak_memory(self) -> int:
        """Most memory, in bytes, that MLX had in any of the run's processes."""
        return max(self.peak_before, mx.get_peak_memory())


def go_back(
    folder: Path, config: Config, report: Callable[[Event], None], *, redo: bool = False
) -> tuple[Checkpoint | None, Records]:
    """Bring a run directory to its newest good checkpoint, and say which ones are not.

    Args:
        folder: the run directory.
        config: the run's configuration.
        report: takes a warning for each thing that is passed over or put right.
        redo: go back even where finished work is cut by it.

    Returns:
        The checkpoint, ``None`` where the run is at its beginning; and the logs from there.

    Raises:
        UserError: more would be cut than a kill leaves, or the folder cannot be written.
    """
    if redo:
        checkpoint, passed_over = newest_checkpoint(folder)
    else:
        checkpoint, passed_over = check_nothing_lost(folder, config.episode.checkpoint_every)
    for reason in passed_over:
        report(Warned(f"{reason}; going back before it"))
    cut = runs.cut_folder(folder)
    with runs.wrap_write_errors(folder):
        put_right = roll_back(folder, checkpoint, cut, ordinary=not redo and not passed_over)
    for text in put_right:
        report(Warned(text))
    if checkpoint is None:
        return None, Records(folder, {name: Log(folder / name) for name in runs.LOGS}, 0, cut)
    if checkpoint.best_lost:
        report(
            Warned(
                f"the best weights so far ({runs.CHECKPOINTS}/{checkpoint.state['best_batch']:06d})"
                " are not whole, and no checkpoint from which they could be made again is"
            )
        )
    if not checkpoint.vouched:
        report(Note(_no_digest(f"checkpoint {checkpoint.folder.name}")))
    peak = int(checkpoint.state.get("peak_memory_bytes", 0))
    return checkpoint, Records(folder, checkpoint.logs, peak, cut)


def _no_digest(name: str) -> str:
    return f"{name} has no digest, as in older versions: a change in it would not be noticed"


def finished_summary(
    records: Records, at_end: bool, report: Callable[[Event], None]
) -> dict[str, Any] | None:
    """The summary of a run that is done; ``None`` where it is to be made.

    Args:
        records: the run's.
        at_end: whether the run's last checkpoint is that of its end. Where it is not, the run was
            made longer, and what was its summary is put aside.
        report: takes a note or warning of what becomes of it.
    """
    path = records.folder / runs.SUMMARY
    if not path.exists():
        return None
    if at_end:
        try:
            summary, _ = read_checked(path)
            if isinstance(summary, dict):
                report(Note("the run is done: there is nothing left to do"))
                return summary
            why = "it is no summary"
        except (ChangedFile, OSError) as error:
            why = str(error)
        report(Warned(f"{runs.SUMMARY}: {why}; it is made again"))
    with runs.wrap_write_errors(records.folder):
        runs.set_aside(path, records.cut)
    return None


def kept(
    records: Records,
    name: str,
    load: Callable[[], tuple[Kept, bool] | None],
    begun: bool,
    report: Callable[[Event], None],
) -> Kept | None:
    """What a run computed once, before anything was learned; ``None`` where that is to be done.

    Called while the student is still untrained, so that what is computed again is the same.

    Args:
        records: the run's.
        name: the file that it is kept in.
        load: reads it: what it is, and whether a digest vouches for it; ``None`` where it is not
            there. It raises :class:`mlx_fd.runs.checked.ChangedFile` where it is not what was
            written.
        begun: whether there is a checkpoint, and so the file should be there.
        report: takes a warning where it is not what was written, or not there.
    """
    again = "it is made again by the student as it was before the run"
    try:
        found = load()
    except (ChangedFile, OSError) as error:
        report(Warned(f"{name}: {error}; {again}"))
        with runs.wrap_write_errors(records.folder):
            runs.set_aside(records.folder / name, records.cut)
        return None
    if found is None:
        if begun:
            report(Warned(f"{name} is missing; {again}"))
        return None
    value, digested = found
    if not digested:
        report(Note(_no_digest(name)))
    return value


@dataclass(frozen=True)
class Run:
    """A run in this process: what it trains, where that is kept, and who watches.

    Attributes:
        records: its logs.
        config: its configuration.
        student: what is trained, whole, as checkpoints hold it.
        base: the folder of the model that the student is made of.
        optimizer: of the student's trainable weights.
        report: takes every event.
        stop: asked after each batch; when true, a checkpoint is written and the run ends there.
        extra: gives what else a checkpoint is to hold: arrays by the names of their files, and
            entries of ``state.json``.
        check: called before a batch's checkpoint is written; raises where the student is not to be
            kept.
    """

    records: Records
    config: Config
    student: Student
    base: Path
    optimizer: optim.Optimizer
    report: Callable[[Event], None]
    stop: Callable[[], bool]
    extra: Callable[[], tuple[Mapping[str, dict[str, mx.array]], Mapping[str, Any]]] = lambda: (
        {},
        {},
    )
    check: Callable[[RunState], None] = lambda state: None


@dataclass(frozen=True)
class Done:
    """A batch that was made, and is not on the disk yet.

    Attributes:
        state: the state after it.
        logs: rows to append, by the names of their files.
        rows: what watchers are shown of it.
        metrics: likewise.
        done: problems so far, over all epochs.
        total: problems of the run, over all epochs.
        warnings: what the user should know of by now.
        ahead: whether the next batch is begun already, which is in no checkpoint: the run can
            neither be saved nor stopped here.
    """

    state: RunState
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    rows: Sequence[EpisodeRow] | Sequence[AttemptRow]
    metrics: MetricsRow | SelfMetricsRow
    done: int
    total: int
    warnings: Sequence[str] = ()
    ahead: bool = False


def begin_or_restore(
    run: Run, checkpoint: Checkpoint | None, first: Callable[[], RunState]
) -> RunState:
    """The state that a run goes on from: a checkpoint's, or a new one, which is saved.

    Raises:
        UserError: the checkpoint does not fit, or the folder cannot be written.
    """
    if checkpoint is not None:
        state = restore(checkpoint, run.student, run.optimizer)
        run.report(Note(f"resuming after batch {state.batch}"))
        return state
    state = first()
    with runs.wrap_write_errors(run.records.folder):
        save(run, state)
    return state


def run_batches(
    run: Run,
    state: RunState,
    batch: Callable[[RunState], Done],
    total: int,
    *,
    ends_frozen: bool = False,
) -> RunState | None:
    """Make batch after batch, with its rows on the disk and checkpoints where they are due.

    Args:
        run: the run.
        state: where it stands.
        batch: makes the next batch.
        total: batches of the run, those before ``state`` too.
        ends_frozen: whether the run is at its end, too, when the gate is frozen.

    Returns:
        The state at the end; ``None`` where the run was stopped before it.

    Raises:
        UserError: the folder cannot be written.
    """
    saved = state.batch
    while state.batch < total and not (ends_frozen and state.gate.frozen):
        best_before = state.best_batch
        done = batch(state)
        state = done.state
        with runs.wrap_write_errors(run.records.folder):
            for name, rows in done.logs.items():
                run.records.append(name, rows)
            stopping = not done.ahead and run.stop()
            due = state.batch - saved >= run.config.episode.checkpoint_every
            if not done.ahead and (due or stopping or state.best_batch != best_before):
                run.check(state)
                save(run, state)
                saved = state.batch
        run.report(BatchDone(done.done, done.total, done.rows, done.metrics))
        for text in done.warnings:
            run.report(Warned(text))
        # Buffers of the largest batch so far would otherwise stay with the process.
        mx.clear_cache()
        if stopping and state.batch < total:
            return None
    return state


def write_summary(run: Run, state: RunState, summary: AnySummary) -> AnySummary:
    """Write ``summary.json``: that of the trainer, with the best checkpoint and the peak memory.

    Raises:
        OSError: the folder cannot be written.
    """
    summary["best_checkpoint"] = f"{state.best_batch:06d}"
    summary["peak_memory_bytes"] = run.records.peak_memory()
    write_json(run.records.folder / runs.SUMMARY, with_digest(summary))
    return summary


def first_state(
    config: Config, losses: dict[str, float], scales: Mapping[str, float] | None = None
) -> RunState:
    """The state before the first batch.

    Args:
        config: the run's; the gate watches ``losses`` from now on.
        losses: on the probe set.
        scales: the fixed factor of each loss.
    """
    names = tuple(scales or losses)
    before = gate.initial_state(config.gate, names)
    before, _ = gate.observe_probe(before, losses, config.gate, cost=0.0)
    return RunState(
        batch=0,
        gate=before,
        scales=dict(scales or {}),
        distilled=0,
        spent=0,
        probe_first=losses,
        probe_last=losses,
        best=1.0,
        best_batch=0,
    )


def restore(checkpoint: Checkpoint, student: Student, optimizer: optim.Optimizer) -> RunState:
    """Put a checkpoint's weights and optimiser in place; where the run stood.

    Raises:
        UserError: they do not fit, or the state is not what mlx-fd wrote.
    """
    load_student(student, checkpoint.folder)
    optimizer.state = tree_unflatten(list(read_arrays(checkpoint.folder / OPTIMIZER).items()))
    try:
        return RunState.from_json(checkpoint.state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint.folder / runs.STATE}: this is not what mlx-fd wrote ({error!r}). Bring "
            "the old file back, or begin a new run."
        ) from error


def save(run: Run, state: RunState) -> None:
    """Write a checkpoint; of several ranks the first does, after all were held against it.

    Raises:
        OSError: the folder cannot be written.
        UserError: two ranks hold other weights, or stand elsewhere.
    """
    config = run.config
    ranks.check_same(
        lambda: _digest(run.student, state),
        f"after batch {state.batch} weights or state are",
    )
    if not ranks.first():
        return
    arrays, entries = run.extra()

    def write(to: Path) -> None:
        save_student(run.student, config.models, run.base, to)
        mx.save_safetensors(str(to / OPTIMIZER), distill.optimizer_arrays(run.optimizer))
        for name, content in arrays.items():
            mx.save_safetensors(str(to / name), content)

    save_checkpoint(
        run.records.folder,
        state.batch,
        write,
        {
            **state.to_json(),
            **entries,
            "checkpoint_every": config.episode.checkpoint_every,
            "peak_memory_bytes": run.records.peak_memory(),
        },
        run.records.logs,
        best=state.best_batch,
        keep=config.episode.keep_checkpoints,
    )


def _digest(student: Student, state: RunState) -> str:
    """SHA-256 of a student's trained weights and a run's state."""
    digest = hashlib.sha256(content_digest(state.to_json()).encode())
    for name, array in tree_flatten(student.trainable_parameters()):
        digest.update(name.encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def finite(value: float) -> float | None:
    """The value, or ``None`` where JSON has no number for it."""
    return value if math.isfinite(value) else None


def stop_row(decision: gate.StopDecision | None) -> StopRow | None:
    """A decision's part of a line of ``metrics.jsonl``."""
    if decision is None:
        return None
    return {
        "action": decision.action,
        "reason": decision.reason,
        "gains": decision.gains,
        "weights": decision.weights,
    }


def trust_row(trust: Trust) -> TrustRow:
    """What a line of ``metrics.jsonl`` says of where the student needs no expert."""
    return {
        "threshold": trust.threshold,
        "coverage": trust.coverage,
        "audited": trust.audited,
        "disagreed": trust.disagreed,
        "bound": trust.bound,
    }


def update_row(update: distill.Update) -> UpdateRow:
    """An optimiser step's part of a line of ``metrics.jsonl``."""
    return {
        "losses": {name: finite(value) for name, value in update.losses.items()},
        "total": finite(update.total),
        "gradient_norm": finite(update.gradient_norm),
        "skipped": update.skipped,
        "tokens": update.tokens,
    }
