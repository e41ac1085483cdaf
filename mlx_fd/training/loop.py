"""The loop: episodes, the gate, the student's updates, the run directory.

A batch of problems goes through the episode's steps together. Every draw is seeded by the run's
seed and the batch's number, and everything else a batch depends on is in the checkpoint, so that a
run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.optimizers as optim

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.evaluation.exam import Question, Result, compare, examine, load_results, save_results
from mlx_fd.feedback import gate
from mlx_fd.feedback.distill import Update, make_optimizer, measure, top_k_error, update
from mlx_fd.feedback.episode import (
    derive_seed,
    expert_feedback,
    finish,
    first_answers,
    is_correct,
    student_feedback,
    to_json,
)
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.phases import PhaseSchedule, combined, phase_weights
from mlx_fd.feedback.samples import Sample, cache_fingerprint, read_text, sample_of, solution_of
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.files import clear_unfinished
from mlx_fd.models.generation import Conversation
from mlx_fd.problems import Problem
from mlx_fd.runs.events import Event, Note, Probed, Step, Warned
from mlx_fd.runs.summary import find_warnings, summarise
from mlx_fd.training.checkpoint import (
    Done,
    Progress,
    Records,
    Run,
    begin_or_restore,
    finished_summary,
    finite,
    first_progress,
    go_back,
    kept,
    run_batches,
    save,
    update_row,
    with_probe,
    write_summary,
)
from mlx_fd.training.probe import PROBE_ROWS, Probe, load_probe, make_probe, save_probe
from mlx_fd.training.selfdistill.in_loop import Lessons, lessons, self_distillation_loss

# A loss that is next to nothing from the start must not drown the others.
_MIN_SCALED = 1e-3
# Episodes that the warnings look back over.
_WATCHED = 64
Report = Callable[[Event], None]


def run(
    folder: Path,
    config: Config,
    pair: Pair,
    probe_problems: Sequence[Problem],
    problems: Sequence[Problem],
    report: Report,
    stop: Callable[[], bool] = lambda: False,
    exam: Sequence[Question] = (),
    *,
    redo: bool = False,
) -> dict[str, Any] | None:
    """Begin a run or go on with it.

    The caller holds the run directory's lock.

    Args:
        folder: the run directory, as :func:`mlx_fd.runs.directory.create` made it.
        config: the run's configuration.
        pair: the models; the student untrained (a checkpoint's weights are put into it).
        probe_problems: the held-out problems that the gate watches.
        problems: the run's problems, in order.
        report: takes every event.
        stop: asked after each batch; when true, a checkpoint is written and the run ends there.
        exam: what the student is examined on before the run and after it, if the truth is known.
        redo: go back to the newest whole checkpoint, whatever was done after it.

    Returns:
        The summary, or ``None`` where ``stop`` ended the run early.

    Raises:
        UserError: the run directory cannot be written, or does not fit the run.
    """
    checkpoint, records = go_back(folder, config, report, redo=redo)
    size = config.generation.batch_size
    batches = math.ceil(len(problems) / size)
    total = batches * config.training.epochs
    at_end = checkpoint is not None and checkpoint.batch >= total
    if (summary := finished_summary(records, at_end, report)) is not None:
        return summary
    begun = checkpoint is not None
    # Whatever the checkpoint holds, the student is still untrained here.
    probe = kept(records, PROBE_ROWS, lambda: load_probe(folder), begun, report)
    if probe is None:
        report(Note(f"looking at {len(probe_problems)} held-out problems first"))
        probe = make_probe(pair, probe_problems, config, _steps(report, 0))
        with runs.wrap_write_errors(folder):
            save_probe(probe, folder)
    optimizer = make_optimizer(pair.student, config.training)
    before = _examined_before(records, config, pair, exam, begun, report)
    this = Run(
        records=records,
        config=config,
        student=pair.student,
        base=pair.student_lm.path,
        optimizer=optimizer,
        report=report,
        stop=stop,
    )
    progress = begin_or_restore(this, checkpoint, lambda: _first(pair, probe, config))
    if stop():
        return None
    report(Probed(progress.probe_first, progress.probe_last, vars(probe.headroom)))
    for concern in probe.headroom.concerns():
        report(Warned(concern))

    learner = _Learner(
        pair=pair,
        probe=probe,
        optimizer=optimizer,
        config=config,
        report=report,
        batches=total,
        cache=_cache(folder, config, pair, report),
    )
    warned: set[str] = set()
    recent: list[dict[str, Any]] = []

    def batch(progress: Progress) -> Done:
        nonlocal recent
        epoch, index = divmod(progress.batch, batches)
        rows: list[dict[str, Any]] = []
        samples: list[Sample] = []
        if epoch == 0:
            chunk = problems[index * size : (index + 1) * size]
            progress, rows, metrics, samples = _batch(progress, chunk, learner)
        else:
            texts = [r for r in runs.read_lines(folder / runs.SAMPLES) if r["batch"] == index]
            progress, metrics = _rehearse(progress, texts, learner)
        logs = {runs.EPISODES: rows, runs.METRICS: [metrics]}
        if config.training.epochs > 1:
            logs[runs.SAMPLES] = [{"batch": index, **s.to_json()} for s in samples]
        recent = [*recent, *rows][-_WATCHED:]
        new = {kind: text for kind, text in find_warnings(recent).items() if kind not in warned}
        warned.update(new)
        return Done(
            progress=progress,
            logs=logs,
            rows=rows,
            metrics=metrics,
            done=epoch * len(problems) + min((index + 1) * size, len(problems)),
            total=config.training.epochs * len(problems),
            warnings=list(new.values()),
        )

    reached = run_batches(this, progress, batch, total)
    if reached is None:
        return None
    looking = time.perf_counter()
    last = probe.losses(pair, config)
    progress = with_probe(reached, last)
    seconds = {"headroom": probe.seconds + time.perf_counter() - looking}
    with runs.wrap_write_errors(folder):
        save(this, progress)
    parts: dict[str, Any] = {}
    if config.losses.teacher_top_k:
        parts["top_k"] = top_k_error(pair.student, probe.samples, config.losses, pair.vocab)
    if exam:
        examining = time.perf_counter()
        after = examine(pair, exam, config.generation, _steps(report, progress.batch))
        took = time.perf_counter() - examining
        seconds["exam"] = before.seconds + took
        with runs.wrap_write_errors(folder):
            save_results(folder / runs.EXAM_AFTER, after, took)
        parts["exam"] = compare(before.results, after)
    with runs.wrap_write_errors(folder):
        summary = summarise(
            runs.read_lines(folder / runs.EPISODES),
            runs.read_lines(folder / runs.METRICS),
            progress.probe_first,
            last,
            vars(probe.headroom),
            seconds,
        )
    return write_summary(this, progress, summary | parts)


@dataclass(frozen=True)
class _Examined:
    """What the untrained student made of the examination, and the seconds it took."""

    results: list[Result]
    seconds: float


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
        return _Examined([], 0.0)
    file = records.folder / runs.EXAM
    found = kept(records, runs.EXAM, lambda: load_results(file, exam), begun, report)
    if found is not None:
        return _Examined(*found)
    begin = time.perf_counter()
    results = examine(pair, exam, config.generation, _steps(report, 0))
    seconds = time.perf_counter() - begin
    with runs.wrap_write_errors(records.folder):
        save_results(file, results, seconds)
    return _Examined(results, seconds)


def _steps(report: Report, batch: int) -> Callable[[str, int], None]:
    return lambda step, tokens: report(Step(batch, step, tokens))


def _first(pair: Pair, probe: Probe, config: Config) -> Progress:
    """The state before the first batch: the probe set's losses make the scales."""
    names = config.losses.losses
    losses = probe.losses(pair, config)
    _check_finite(losses, 0, config)
    if config.losses.scales:
        scales = dict(zip(names, config.losses.scales, strict=True))
    else:
        # A loss that nothing is known of is left as it is.
        scales = {
            name: 1 / max(losses[name], _MIN_SCALED) if name in losses else 1.0 for name in names
        }
    return first_progress(config, losses, scales)


def _check_finite(losses: dict[str, float], batch: int, config: Config) -> None:
    """Stop a run whose student is lost, before its state is saved.

    Raises:
        UserError: a loss is not finite.
    """
    lost = [name for name, value in losses.items() if not math.isfinite(value)]
    if not lost:
        return
    if batch == 0:
        raise UserError(
            f"the {lost[0]} loss is not finite before any training: the weights of the expert "
            "or the student are not whole; fetch or convert them again."
        )
    rates = config.training
    raise UserError(
        f"the student diverged in batch {batch}: its {lost[0]} loss is not finite any more. The "
        "checkpoints before it are whole. Begin a new run with lower learning rates (--lora-rate "
        f"{rates.lora_rate:g}, --score-rate {rates.score_rate:g}, --projection-rate "
        f"{rates.projection_rate:g} were too high) or a smaller --max-grad-norm."
    )


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


@dataclass(frozen=True)
class _Learner:
    """All that a batch works with and that stays the same from batch to batch."""

    pair: Pair
    probe: Probe
    optimizer: optim.Optimizer
    config: Config
    report: Report
    batches: int  # of all epochs
    cache: TeacherCache | None


@dataclass(frozen=True)
class _Seen:
    """A problem's feedback as the gate sees it."""

    sample: Sample
    losses: dict[str, float]
    decision: gate.TriggerDecision


def _batch(
    progress: Progress, problems: Sequence[Problem], learner: _Learner
) -> tuple[Progress, list[dict[str, Any]], dict[str, Any], list[Sample]]:
    """One batch of episodes: the state after it, its rows, its metrics, what was learned from."""
    begin = time.perf_counter()
    pair, config, cache = learner.pair, learner.config, learner.cache
    number = progress.batch
    on_progress = _steps(learner.report, number)

    def seeds(step: str) -> int:
        return derive_seed(config.episode.seed, number, step)

    # 1. and 2. Answers, then feedback of both.
    drafts = first_answers(pair, problems, config.generation, seeds("answer"), on_progress)
    drafts = student_feedback(
        pair, drafts, config.generation, seeds("student_feedback"), on_progress
    )
    audits = [gate.audited(d.problem.id, config.episode.seed, config.gate) for d in drafts]
    asked = [
        place
        for place, draft in enumerate(drafts)
        if audits[place] or not gate.stands_alone(progress.gate, draft.student_score, config.gate)
    ]
    answered = expert_feedback(
        pair, [drafts[p] for p in asked], config.generation, seeds("expert_feedback"), on_progress
    )
    for place, draft in zip(asked, answered, strict=True):
        drafts[place] = draft

    # 3. The gate looks at every feedback the expert gave.
    state = progress.gate
    readings: dict[int, _Seen] = {}
    for place in asked:
        share = _share(drafts[place].problem.id, config.episode.seed)
        on_policy = share < config.losses.on_policy_fraction
        sample = sample_of(pair, drafts[place], config.losses, on_policy=on_policy, cache=cache)
        losses = measure(pair.student, pair.expert, [sample], config.losses, pair.vocab, 1)
        decision = _decide(state, sample, drafts[place].student_score, losses, config)
        readings[place] = _Seen(sample, losses, decision)
        state = gate.observe_scores(
            state, drafts[place].student_score, sample.expert_score, config.gate
        )
        if not state.frozen or audits[place]:
            state = gate.observe_sample(state, losses, config.gate)

    # 5. and 6. Merge, revise, criticise, final answer: the expert's, so it matters not to them
    # whether the student has learned yet, but it can learn from what they end in.
    outcomes = finish(pair, drafts, config.generation, config.episode, seeds, on_progress)

    # 4. The student learns where it lags.
    lagging = [place for place, reading in readings.items() if reading.decision.distil]
    samples = [readings[place].sample for place in lagging]
    if config.losses.learns_solutions:
        finals = {place: outcomes[place].final for place in lagging}
        samples += [
            solution_of(pair, problems[place].question, final, config.losses, cache=cache)
            for place, final in finals.items()
            if is_correct(final.final, problems[place])
        ]
    weights = _weights(state, learner, number)
    own = None
    if config.losses.student_context != "none":
        own = lessons([outcomes[place] for place in lagging], config.losses.student_context)
    updates = _distil(learner, samples, weights, progress.scales, on_progress, own)
    after = {
        place: measure(pair.student, pair.expert, [r.sample], config.losses, pair.vocab, 1)
        for place, r in readings.items()
        if updates and r.decision.distil
    }
    for losses in after.values():
        _check_finite(losses, number + 1, config)
    progress, stop_decision = _after(dataclasses.replace(progress, gate=state), updates, learner)
    rows = [
        to_json(
            outcome,
            number * config.generation.batch_size + place,
            _gate_row(readings.get(place), after.get(place)),
        )
        for place, outcome in enumerate(outcomes)
    ]
    metrics = {
        "batch": number,
        "lagging": len(lagging),
        **_metrics(progress, weights, updates, stop_decision),
        "seconds": round(time.perf_counter() - begin, 3),
    }
    return progress, rows, metrics, samples if updates else []


def _rehearse(
    progress: Progress, texts: Sequence[dict[str, Any]], learner: _Learner
) -> tuple[Progress, dict[str, Any]]:
    """Learn once more from what a batch of episodes gave; the state after it, and its metrics."""
    begin = time.perf_counter()
    number = progress.batch
    weights = _weights(progress.gate, learner, number)
    updates: list[Update] = []
    if not progress.gate.frozen:
        samples = [_again(text, learner) for text in texts]
        on_progress = _steps(learner.report, number)
        updates = _distil(learner, samples, weights, progress.scales, on_progress)
    progress, stop_decision = _after(progress, updates, learner)
    return progress, {
        "batch": number,
        "lagging": len(texts),
        **_metrics(progress, weights, updates, stop_decision),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _again(text: dict[str, Any], learner: _Learner) -> Sample:
    """A sample from a row of ``samples.jsonl``."""
    prompt, target = tuple(text["prompt"]), tuple(text["target"])
    reading = read_text(
        learner.pair, Conversation(), prompt, target, learner.config.losses, learner.cache
    )
    return Sample.from_json(text, reading)


def _weights(state: gate.GateState, learner: _Learner, number: int) -> dict[str, float]:
    """What each loss counts in a batch; sum 1."""
    options, names = learner.config.gate, learner.config.losses.losses
    if options.loss_weights == "fixed":
        return dict.fromkeys(names, 1 / len(names))
    lagging = gate.weights(state, options)
    if options.loss_weights == "ema":
        return lagging
    schedule = PhaseSchedule(begin=options.phase_begin, end=options.phase_end)
    phases = phase_weights(names, number / learner.batches, schedule)
    return phases if options.loss_weights == "phases" else combined(lagging, phases)


def _after(
    progress: Progress, updates: Sequence[Update], learner: _Learner
) -> tuple[Progress, gate.StopDecision | None]:
    """The state after a batch's updates, with a look at the probe set where one is due."""
    config = learner.config
    progress = dataclasses.replace(
        progress,
        batch=progress.batch + 1,
        distilled=progress.distilled + bool(updates),
        spent=progress.spent + len(updates),
    )
    if not updates or progress.distilled % config.episode.probe_every:
        return progress, None
    losses = learner.probe.losses(learner.pair, config)
    _check_finite(losses, progress.batch, config)
    state, decision = gate.observe_probe(
        progress.gate, losses, config.gate, cost=float(progress.spent)
    )
    progress = dataclasses.replace(progress, gate=state, spent=0)
    return with_probe(progress, losses), decision


def _metrics(
    progress: Progress,
    weights: dict[str, float],
    updates: Sequence[Update],
    decision: gate.StopDecision | None,
) -> dict[str, Any]:
    return {
        "weights": weights,
        "updates": [update_row(u) for u in updates],
        "probe": progress.probe_last if decision else None,
        "stop": dataclasses.asdict(decision) if decision else None,
        "frozen": progress.gate.frozen,
        "sure": {"agreed": sum(progress.gate.sure), "of": len(progress.gate.sure)},
        "distil_seconds": round(sum(update.seconds for update in updates), 3),
    }


def _decide(
    state: gate.GateState,
    sample: Sample,
    student_score: float | None,
    losses: dict[str, float],
    config: Config,
) -> gate.TriggerDecision:
    """The gate's decision; a sample that overflowed in the expert is not learned from."""
    for name, value in losses.items():
        if not math.isfinite(value):
            return gate.TriggerDecision(False, f"the {name} loss of this sample is not finite")
    return gate.trigger(state, sample.expert_score, student_score, losses, config.gate)


def _share(problem_id: str, seed: int) -> float:
    digest = hashlib.sha256(f"on-policy/{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _distil(
    learner: _Learner,
    samples: Sequence[Sample],
    weights: dict[str, float],
    scales: dict[str, float],
    on_progress: Callable[[str, int], None],
    own: Lessons | None = None,
) -> list[Update]:
    """The batch's optimiser steps; ``own`` is what the student learns from itself."""
    if not samples:
        return []
    pair, config = learner.pair, learner.config
    scaled = {name: weights[name] * scales[name] for name in config.losses.losses}

    def itself() -> tuple[Any, float]:
        assert own is not None
        return self_distillation_loss(pair.student_lm, own, config.training)

    done = []
    for _ in range(config.training.kd_steps):
        done.append(
            update(
                pair,
                learner.optimizer,
                samples,
                scaled,
                config.losses,
                config.training,
                itself if own is not None and own.attempts else None,
            )
        )
        on_progress("distil", sum(len(sample.target) for sample in samples))
    return done


def _gate_row(reading: _Seen | None, after: dict[str, float] | None) -> dict[str, Any]:
    if reading is None:
        return {"distilled": False, "reason": "the student stands alone"}
    return {
        "distilled": reading.decision.distil,
        "reason": reading.decision.reason,
        "on_policy": reading.sample.on_policy,
        "losses_before": {name: finite(value) for name, value in reading.losses.items()},
        "losses_after": after,
    }
