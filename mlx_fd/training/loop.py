"""The loop over a run's batches, and what it keeps in the run directory.

A batch is :mod:`mlx_fd.training.batch`.

A batch of problems goes through the episode's steps together. Every draw is seeded by the run's
seed and the batch's number, and everything else a batch depends on is in the checkpoint, so that a
run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.evaluation.exam import Result, compare, exam_digest, examine, load_results, save_results
from mlx_fd.evaluation.reliability import judging
from mlx_fd.feedback.distill import make_optimizer, top_k_error
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample, cache_fingerprint
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.files import clear_unfinished
from mlx_fd.models.checking import check_attention, check_recompute
from mlx_fd.problems import Problem
from mlx_fd.problems.sources import Question
from mlx_fd.runs.acceptance import acceptance
from mlx_fd.runs.events import Note, Probed, Probing, Started, Warned
from mlx_fd.runs.records.episodes import EpisodeRow, LoggedSampleRow
from mlx_fd.runs.records.parts import BeforeAfterRow
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.records.summary import Summary, TopKRow
from mlx_fd.runs.summary import find_warnings, not_said_yet, summarise
from mlx_fd.training.batch import Begun, overlaps, run_batch
from mlx_fd.training.checkpoint import (
    Done,
    Records,
    Run,
    RunState,
    begin_or_restore,
    finished_summary,
    first_state,
    go_back,
    kept,
    run_batches,
    save,
    with_probe,
    write_summary,
)
from mlx_fd.training.diverged import check_finite, check_weights
from mlx_fd.training.job import Job
from mlx_fd.training.learner import Learner, Report, report_steps
from mlx_fd.training.probe import Probe, load_probe, make_probe, save_probe
from mlx_fd.training.rehearsal import rehearse_batch, samples_again
from mlx_fd.training.replay import Memory

# A loss that is next to nothing from the start must not drown the others.
_MIN_SCALED = 1e-3
# Episodes that the warnings look back over.
_WATCHED = 64


def run(
    job: Job,
    pair: Pair,
    exam: Sequence[Question] = (),
    *,
    warm_up: Callable[[Callable[[], bool]], SelfSummary | None] | None = None,
) -> Summary | None:
    """Begin a run or go on with it.

    Args:
        job: its folder, configuration and problems, and who watches.
        pair: the models; the student untrained (a checkpoint's weights are put into it).
        exam: what the student is examined on before the run and after it, if the truth is known.
        warm_up: makes of the untrained student the one that the loop begins with, or takes what it
            ended with; gives its summary, ``None`` where ``stop`` ended it early.

    Returns:
        The summary, or ``None`` where ``stop`` ended the run early.

    Raises:
        UserError: the run directory cannot be written, or does not fit the run.
    """
    folder, config, report, stop = job.folder, job.config, job.report, job.stop
    problems = job.problems
    checkpoint, records = go_back(folder, config, report, redo=job.redo)
    size = config.generation.batch_size
    batches = math.ceil(len(problems) / size)
    total = batches * config.training.epochs
    at_end = checkpoint is not None and checkpoint.batch >= total
    if (whole := finished_summary(records, at_end, report)) is not None:
        return cast(Summary, whole)
    if config.training.grad_checkpoint:
        check_recompute(pair.student.view)
    if config.losses.needs_attention:
        check_attention(pair.expert.view)
        check_attention(pair.student.view)
    begun = checkpoint is not None
    # Whatever the checkpoint holds, the student is still untrained here.
    before = _examined_before(records, config, pair, exam, begun, report)
    warmed_up: SelfSummary | None = None
    if warm_up is not None:
        warmed_up = warm_up(stop)
        if warmed_up is None:
            return None
    # As it is before the loop's first update, likewise.
    probe = _probe(records, config, pair, job.probe_problems, begun, report)
    optimizer = make_optimizer(pair.student, config.training)
    # Whether the student has learned since it was last measured on the probe set.
    unseen = False

    def check(state: RunState) -> None:
        check_weights(pair.student, state.batch, config)
        if unseen:
            # Recorded nowhere: the run goes on as without it.
            check_finite(probe.losses(pair, config), state.batch, config)

    this = Run(
        records=records,
        config=config,
        student=pair.student,
        base=pair.student_lm.path,
        optimizer=optimizer,
        report=report,
        stop=stop,
        check=check,
    )
    state = begin_or_restore(this, checkpoint, lambda: _first(pair, probe, config))
    if stop():
        return None
    report(Probed(state.probe_first, state.probe_last, probe.headroom.to_json()))
    for concern in probe.headroom.concerns():
        report(Warned(concern))
    epoch, index = divmod(state.batch, batches)
    before_this = epoch * len(problems) + min(index * size, len(problems))
    report(Started(before_this, config.training.epochs * len(problems)))

    cache = _cache(folder, config, pair, report)
    learner = Learner(
        pair=pair,
        probe=probe,
        optimizer=optimizer,
        config=config,
        report=report,
        batches=total,
        cache=cache,
        memory=Memory(lambda lines: _samples_again(folder, lines, pair, config, cache)),
    )
    warned: set[str] = set()
    recent: list[EpisodeRow] = []
    ahead: Begun | None = None

    def batch(state: RunState) -> Done:
        nonlocal recent, ahead, unseen
        epoch, index = divmod(state.batch, batches)
        if epoch == 0:
            begin, end = index * size, (index + 1) * size
            following = problems[end : end + size] if overlaps(state.batch, config) else ()
            result = run_batch(state, problems[begin:end], learner, ahead, following)
            ahead = result.ahead
        else:
            again = [row for row in runs.read_samples(folder) if row["batch"] == index]
            result = rehearse_batch(state, again, learner)
        if result.metrics["updates"]:
            unseen = result.metrics["probe"] is None
        logs: dict[str, Sequence[Mapping[str, Any]]] = {
            runs.EPISODES: result.rows,
            runs.METRICS: [result.metrics],
        }
        if result.samples:
            texts: list[LoggedSampleRow] = [
                {"batch": index, **sample.to_json()} for sample in result.samples
            ]
            logs[runs.SAMPLES] = texts
        recent = [*recent, *result.rows][-_WATCHED:]
        return Done(
            state=result.state,
            logs=logs,
            rows=result.rows,
            metrics=result.metrics,
            done=epoch * len(problems) + min((index + 1) * size, len(problems)),
            total=config.training.epochs * len(problems),
            warnings=not_said_yet(find_warnings(recent), warned),
            ahead=ahead is not None,
        )

    reached = run_batches(this, state, batch, total)
    if reached is None:
        return None
    return _finish(this, reached, learner, exam, before, warmed_up)


def _finish(
    this: Run,
    state: RunState,
    learner: Learner,
    exam: Sequence[Question],
    before: _Examined,
    warmed_up: SelfSummary | None,
) -> Summary:
    """Look at the probe set for the last time, examine the student again, and write the summary.

    Args:
        this: the run.
        state: after its last batch.
        learner: the run's.
        exam: what the student is examined on, if anything.
        before: what came of that before the run.
        warmed_up: the summary of the warm-up, where there was one.
    """
    folder, config, pair, probe = this.records.folder, this.config, learner.pair, learner.probe
    looking = time.perf_counter()
    last = probe.losses(pair, config)
    check_weights(pair.student, state.batch, config)
    check_finite(last, state.batch, config)
    state = with_probe(state, last)
    seconds = {"headroom": probe.seconds + time.perf_counter() - looking}
    with runs.wrap_write_errors(folder):
        save(this, state)
    if warmed_up is not None:
        seconds["warm_up"] = warmed_up["seconds"]["total"]
    top_k: TopKRow | None = None
    # No bound is known of tokens that only one of two tokenizers has.
    if config.losses.teacher_top_k and pair.shared is None:
        top_k = top_k_error(pair.student, probe.samples, config.losses, pair.vocab)
    compared: dict[str, BeforeAfterRow] | None = None
    if exam:
        examining = time.perf_counter()
        after = examine(pair, exam, config.generation, learner.on_tokens(state.batch))
        took = time.perf_counter() - examining
        seconds["exam"] = before.seconds + took
        with runs.wrap_write_errors(folder):
            save_results(folder / runs.EXAM_AFTER, after, took, before.digest)
        compared = compare(before.results, after, by_head=pair.student.scores)
    with runs.wrap_write_errors(folder):
        episodes = runs.read_episodes(folder)
        summary = summarise(
            episodes,
            runs.read_metrics(folder),
            state.probe_first,
            last,
            probe.headroom.to_json(),
            seconds,
        )
        summary["judging"] = judging(episodes)
        if accepted := acceptance(episodes):
            summary["acceptance"] = accepted
        if top_k is not None:
            summary["top_k"] = top_k
        if compared is not None:
            summary["exam"] = compared
        if warmed_up is not None:
            summary["warm_up"] = warmed_up
        return write_summary(this, state, summary)


def _probe(
    records: Records,
    config: Config,
    pair: Pair,
    held_out: Sequence[Problem],
    begun: bool,
    report: Report,
) -> Probe:
    """The probe set with the untrained student's losses: what is kept of it, or made now."""
    folder = records.folder
    probe = kept(records, runs.PROBE, lambda: load_probe(folder), begun, report)
    if probe is not None:
        return probe
    size = len(held_out)
    report(Note(f"first probe evaluation: {size} held-out problems"))
    report(Probing(0, size))
    probe = make_probe(
        pair,
        held_out,
        config,
        report_steps(report, 0),
        on_problems=lambda evaluated: report(Probing(evaluated, size)),
    )
    with runs.wrap_write_errors(folder):
        save_probe(probe, folder)
    return probe


@dataclass(frozen=True)
class _Examined:
    """What the untrained student made of the examination, the seconds it took, and which it was."""

    results: list[Result]
    seconds: float
    digest: str


def _examined_before(
    records: Records,
    config: Config,
    pair: Pair,
    exam: Sequence[Question],
    begun: bool,
    report: Report,
) -> _Examined:
    """The examination before the run, where there is one: what is kept of it, or taken now."""
    if not exam:
        return _Examined([], 0.0, "")
    given = records.folder / runs.BEGUN
    digest = exam_digest(exam, config, [pair.student_lm.path, *([given] if given.is_dir() else [])])
    file = records.folder / runs.EXAM
    found = kept(records, runs.EXAM, lambda: load_results(file, exam, digest), begun, report)
    if found is not None:
        return _Examined(*found, digest)
    begin = time.perf_counter()
    results = examine(pair, exam, config.generation, report_steps(report, 0))
    seconds = time.perf_counter() - begin
    with runs.wrap_write_errors(records.folder):
        save_results(file, results, seconds, digest)
    return _Examined(results, seconds, digest)


def _first(pair: Pair, probe: Probe, config: Config) -> RunState:
    """The state before the first batch: the probe set's losses make the scales."""
    names = config.losses.losses
    losses = probe.losses(pair, config)
    check_finite(losses, 0, config)
    if config.losses.scales:
        scales = dict(zip(names, config.losses.scales, strict=True))
    else:
        # A loss that nothing is known of is left as it is.
        scales = {
            name: 1 / max(losses[name], _MIN_SCALED) if name in losses else 1.0 for name in names
        }
    return first_state(config, losses, scales)


def _samples_again(
    folder: Path, lines: Sequence[int], pair: Pair, config: Config, cache: TeacherCache | None
) -> list[Sample]:
    """The samples of some lines of a run's ``samples.jsonl``, after a resume."""
    rows = runs.read_samples(folder)
    return samples_again([rows[line] for line in lines], pair, config, cache)


def _cache(folder: Path, config: Config, pair: Pair, report: Report) -> TeacherCache | None:
    """The teacher cache, where there is to be one."""
    if not config.losses.teacher_top_k:
        return None
    kept_in = Path(config.losses.teacher_cache or folder / runs.TEACHER)
    clear_unfinished(kept_in)
    return TeacherCache(
        kept_in,
        cache_fingerprint(pair, config.losses),
        lambda text: report(Warned(text)),
    )
