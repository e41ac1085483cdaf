"""The loop of self-distillation: attempts, their contexts, an update, the run directory.

As in :mod:`mlx_fd.training.loop` every draw is seeded by the run's seed and the batch's number, and
all else that a batch depends on is in the checkpoint: a resumed run is the run that was not
stopped.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.files import clear_unfinished
from mlx_fd.models.checking import check_recompute
from mlx_fd.models.student import read_trained
from mlx_fd.runs.checkpoints import Checkpoint
from mlx_fd.runs.events import Note, Probed, Started, Warned
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.self_distillation_summary import find_warnings, held_out_share, summarise
from mlx_fd.runs.summary import not_said_yet
from mlx_fd.training.checkpoint import (
    Done,
    Run,
    RunState,
    begin_or_restore,
    finished_summary,
    first_state,
    go_back,
    run_batches,
    save,
    with_probe,
    write_summary,
)
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill.batch import (
    Learner,
    Models,
    Report,
    check_student,
    held_out_losses,
    run_batch,
)
from mlx_fd.training.selfdistill.headroom import initial_headroom, say_headroom
from mlx_fd.training.selfdistill.playbook import Playbook
from mlx_fd.training.selfdistill.reading import Expert, expert_cache
from mlx_fd.training.selfdistill.teacher import TEACHER_WEIGHTS, first_teacher, keeps_teacher


def run(job: Job, models: Models) -> SelfSummary | None:
    """Begin a run or go on with it.

    Args:
        job: its folder, configuration and problems, and who watches.
        models: the student untrained (a checkpoint's weights are put into it).

    Returns:
        The summary, or ``None`` where ``stop`` ended the run early.

    Raises:
        UserError: the run directory cannot be written, or does not fit the run.
    """
    folder, config, report, stop = job.folder, job.config, job.report, job.stop
    probe_problems, problems = job.probe_problems, job.problems
    checkpoint, records = go_back(folder, config, report, redo=job.redo)
    size = config.generation.batch_size
    batches = math.ceil(len(problems) / size)
    total = batches * config.training.epochs
    at_end = checkpoint is not None and (
        checkpoint.batch >= total or checkpoint.state["gate"]["frozen"]
    )
    if (whole := finished_summary(records, at_end, report)) is not None:
        return cast(SelfSummary, whole)
    model = models.student_lm.model
    if config.training.grad_checkpoint:
        check_recompute(models.student_lm.view)
    # The rate is set before each update.
    optimizer = optim.AdamW(
        config.training.lora_rate,
        weight_decay=config.training.weight_decay,
        bias_correction=True,
    )
    optimizer.init(model.trainable_parameters())
    learner = Learner(
        models=models,
        optimizer=optimizer,
        teacher=first_teacher(model, config.selfdistill),
        config=config,
        report=report,
        expert=_expert(folder, config, models, report),
    )
    # Whatever the checkpoint holds, the student is still untrained here.
    headroom, seconds = initial_headroom(records, learner, probe_problems, checkpoint is not None)

    def check(state: RunState) -> None:
        check_student(learner, probe_problems[0], state.batch)

    this = Run(
        records=records,
        config=config,
        student=models.student,
        base=models.student_lm.path,
        optimizer=optimizer,
        report=report,
        stop=stop,
        extra=learner.extra,
        check=check,
    )
    state = begin_or_restore(this, checkpoint, lambda: first_state(config, headroom.losses))
    if checkpoint is not None:
        _restore_teacher(learner, checkpoint)
    if stop():
        return None
    say_headroom(headroom, config, report)
    report(Probed(state.probe_first, state.probe_last, headroom.to_json()))
    epochs = config.training.epochs

    def problems_before(number: int) -> int:
        epoch, index = divmod(number, batches)
        return epoch * len(problems) + min(index * size, len(problems))

    report(Started(problems_before(state.batch), epochs * len(problems)))

    # From the first batch on: what is worse than at the beginning is worth a warning.
    metrics_so_far = list(runs.read_self_metrics(folder))
    warned = set[str]()

    def new_warnings(state: RunState) -> list[str]:
        held_out = [
            held_out_share(losses, len(probe_problems))
            for losses in (state.probe_first, state.probe_last)
        ]
        vocab = models.student_lm.vocab
        found = find_warnings(metrics_so_far, held_out, config.training.lora_rate, vocab)
        return not_said_yet(found, warned)

    def batch(state: RunState) -> Done:
        epoch, index = divmod(state.batch, batches)
        chunk = problems[index * size : (index + 1) * size]
        written = runs.read_attempts(folder) if epoch and learner.expert is not None else []
        each = config.selfdistill.num_generations
        attempts = range(index * size * each, (index * size + len(chunk)) * each)
        again = [row for row in written if row.get("by_expert") and row["attempt"] in attempts]
        state, rows, metrics = run_batch(state, chunk, probe_problems, learner, again)
        metrics_so_far.append(metrics)
        # What the expert wrote in the first epoch is on the disk already.
        new = [row for row in rows if not (epoch and row.get("by_expert"))]
        return Done(
            state=state,
            logs={runs.ATTEMPTS: new, runs.METRICS: [metrics]},
            rows=new,
            metrics=metrics,
            done=problems_before(state.batch),
            total=epochs * len(problems),
            warnings=new_warnings(state),
        )

    reached = run_batches(this, state, batch, total, ends_frozen=True)
    if reached is None:
        return None
    state = reached
    if state.gate.frozen:
        report(Note(f"the gate ends the run: {state.gate.reason}"))
    looking = time.perf_counter()
    state = with_probe(state, held_out_losses(learner, probe_problems, state.batch))
    seconds += time.perf_counter() - looking
    check(state)
    for text in new_warnings(state):
        report(Warned(text))
    with runs.wrap_write_errors(folder):
        save(this, state)
        summary = summarise(
            runs.read_attempts(folder),
            runs.read_self_metrics(folder),
            state.probe_first,
            state.probe_last,
            len(probe_problems),
            headroom.to_json(),
            {"headroom": seconds},
        )
        return write_summary(this, state, summary)


def _expert(folder: Path, config: Config, models: Models, report: Report) -> Expert | None:
    """The expert that teaches, with its cache where there is one."""
    model = models.expert(config.selfdistill)
    if model is None:
        return None
    kept_in = Path(config.losses.teacher_cache or folder / runs.TEACHER)
    clear_unfinished(kept_in)
    cache = expert_cache(
        kept_in,
        model,
        models.student_lm.vocab,
        config.selfdistill,
        lambda text: report(Warned(text)),
    )
    return Expert(model, cache)


def _restore_teacher(learner: Learner, checkpoint: Checkpoint) -> None:
    """The teacher's weights and the playbook of a checkpoint whose student is in place."""
    options, model = learner.config.selfdistill, learner.models.student_lm.model
    if keeps_teacher(options):
        learner.teacher = read_trained(checkpoint.folder / TEACHER_WEIGHTS)
        mx.eval(learner.teacher)
    else:
        learner.teacher = first_teacher(model, options)
    learner.playbook = Playbook.from_json(checkpoint.state["playbook"])
