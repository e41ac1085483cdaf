"""One batch of episodes, in the order of the method; and a batch that is learned from again.

:func:`run_batch` reads like :mod:`mlx_fd.feedback.episode`:

1. answer                                   :func:`_first_halves`
2. student's and expert's feedback          likewise
3. the gate                                 :func:`_ask_gate`
4. learn; the student's feedback again      :func:`_learn_now`, :func:`_second_halves`
5. merge, revise, criticise, final answer   likewise

What this ends in, right final answers, is learned from in the next batch's update. With ``order``
``learn-last`` step 4 comes after step 5, learns from those too, and nothing is said again.

With ``batching`` ``continuous`` each problem goes on as soon as its own turn ends, and steps 4 (its
end) and 5 go along with steps 1 and 2 of the next batch: between two updates nothing else changes.

Of several ranks (:mod:`mlx_fd.models.ranks`) each has a share of the batch's episodes; what the
gate reads and what is learned from are all ranks'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_fd.config import CONTINUOUS, Config
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import Group, OnTokens, Seeds, Turns, ask_in_step, derive_seed
from mlx_fd.feedback.continuous import ask_continuously
from mlx_fd.feedback.distill import Update, measure_each, set_rates, update
from mlx_fd.feedback.episode import first_half, second_half
from mlx_fd.feedback.loss_terms import LOSSES
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.phases import PhaseSchedule, combined, phase_weights
from mlx_fd.feedback.rows import episode_row, with_second
from mlx_fd.feedback.samples import (
    Sample,
    gather_samples,
    read_both,
    read_text,
    sample_of,
    solution_of,
)
from mlx_fd.feedback.stages import Answered, Finished, Judged, StudentFeedback
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.feedback.turns import write_first_answer, write_student_answer
from mlx_fd.feedback.verdicts import REASONS, Reviewed, tally
from mlx_fd.models import ranks
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.metering import metered
from mlx_fd.problems import Problem
from mlx_fd.runs.acceptance import accepted_count
from mlx_fd.runs.events import Event, Step, Warned
from mlx_fd.runs.records import EpisodeRow, GateRow, MetricsRow, SampleRow
from mlx_fd.training.answering import Answering, observe, warmed
from mlx_fd.training.checkpoint import (
    RunState,
    finite,
    stop_row,
    trust_row,
    update_row,
    with_probe,
)
from mlx_fd.training.diverged import check_finite, diverged
from mlx_fd.training.probe import Probe
from mlx_fd.training.replay import Memory, Replay, choose
from mlx_fd.training.selfdistill.in_loop import Lessons, lessons, self_distillation_loss
from mlx_fd.training.work import EXPERT, STUDENT, work_row

Report = Callable[[Event], None]


@dataclass(frozen=True)
class Learner:
    """All that a batch works with and that stays the same from batch to batch.

    Attributes:
        pair: the models.
        probe: the probe set.
        optimizer: of the student.
        config: of the run.
        report: told of tokens as they come.
        batches: batches of all epochs.
        cache: of the expert's outputs; ``None``: there is none.
        memory: of what the student learned from.
    """

    pair: Pair
    probe: Probe
    optimizer: optim.MultiOptimizer
    config: Config
    report: Report
    batches: int
    cache: TeacherCache | None
    memory: Memory

    def progress(self, batches: int) -> float:
        """The share of the run's episodes that is done after so many batches, in [0, 1]."""
        return min(1.0, batches * self.config.training.epochs / self.batches)

    def on_tokens(self, batch: int) -> OnTokens:
        """What reports the tokens of a batch's steps."""
        return report_steps(self.report, batch)

    def carry_on(self, groups: Sequence[Group]) -> list[list[Any]]:
        """What parts of episodes come to, group by group."""
        options = self.config.generation
        if options.batching == CONTINUOUS:
            return ask_continuously(groups, options.places or options.batch_size)
        return [ask_in_step(one.works, one.seeds, one.on_tokens) for one in groups]

    def losses(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """The student's losses on each of some samples, as it is now."""
        pair, micro_batch = self.pair, self.config.training.micro_batch
        return measure_each(
            pair.student, pair.expert, samples, self.config.losses, pair.vocab, micro_batch
        )


def report_steps(report: Report, batch: int) -> OnTokens:
    """What reports the tokens of a batch's steps."""
    return lambda step, tokens: report(Step(batch, step, tokens))


@dataclass(frozen=True)
class Begun:
    """A batch after step 2.

    Attributes:
        first: its episodes.
        second: those of the student's answers with ``answers_by`` ``both``, which end here.
    """

    first: list[Reviewed]
    second: list[Reviewed]


@dataclass(frozen=True)
class BatchResult:
    """A batch of episodes that is done.

    Attributes:
        state: where the run stands after it.
        rows: its lines of ``episodes.jsonl``; none in a later epoch.
        metrics: its line of ``metrics.jsonl``.
        samples: what there is to learn from since the batch before, for ``samples.jsonl``.
        ahead: what is there of the next batch, where that was begun.
    """

    state: RunState
    rows: list[EpisodeRow]
    metrics: MetricsRow
    samples: list[Sample]
    ahead: Begun | None = None


@dataclass(frozen=True)
class _Reading:
    """What the gate reads of a sample.

    Attributes:
        losses: the student's on it.
        expert_score: in [-1, 1]; ``None`` where it could not be read.
        student_score: the score head's.
        nothing_said: whether the expert's feedback ended within its thought.
        audited: whether the sample counts while the student is frozen.
    """

    losses: dict[str, float]
    expert_score: float | None
    student_score: float | None
    nothing_said: bool
    audited: bool


@dataclass(frozen=True)
class _Gated:
    """A problem's feedback after step 3.

    Attributes:
        sample: what the student can learn from it.
        losses: the student's on it.
        decision: the gate's.
    """

    sample: Sample
    losses: dict[str, float]
    decision: gate.TriggerDecision


def overlaps(number: int, config: Config) -> bool:
    """Whether a batch's end goes along with the beginning of the next one.

    It depends on the batch's number alone: whoever writes beside a text can change the last bit of
    a sum, and a run that was resumed is to be the one that was not. So nothing overlaps where a
    checkpoint is due.
    """
    continuous = config.generation.batching == CONTINUOUS and not config.learns_last
    return continuous and (number + 1) % config.episode.checkpoint_every != 0


def run_batch(
    state: RunState,
    problems: Sequence[Problem],
    learner: Learner,
    begun: Begun | None = None,
    following: Sequence[Problem] = (),
) -> BatchResult:
    """One batch of episodes: steps 1 to 5; with ``profile``, what it did beside the least.

    Args:
        state: where the run stands.
        problems: the batch's.
        learner: the run's.
        begun: what is there of it already.
        following: problems of the next batch, to be begun beside the end of this one; none: it
            begins for itself.
    """
    if not learner.config.episode.profile:
        return _run_batch(state, problems, learner, begun, following)[0]
    views = {EXPERT: learner.pair.expert.view, STUDENT: learner.pair.student.view}
    with metered(views) as meter:
        done, updates = _run_batch(state, problems, learner, begun, following)
    done.metrics["work"] = work_row(meter, done.rows, done.samples, updates, learner.config)
    return done


def _run_batch(
    state: RunState,
    problems: Sequence[Problem],
    learner: Learner,
    begun: Begun | None,
    following: Sequence[Problem],
) -> tuple[BatchResult, list[Update]]:
    begin = time.perf_counter()
    config, before, number = learner.config, state, state.batch
    first = number * config.generation.batch_size + ranks.part(len(problems)).start
    # 1. and 2.
    begun = begun or Begun(*learner.carry_on(_first_halves(state, problems, learner)))
    reviewed, second = begun.first, begun.second
    judged, taught = [one.judged for one in reviewed], [one.taught for one in reviewed]
    _check_feedback([one.judged.student for one in (*reviewed, *second)], number, config)
    drawn = [one.judged for one in second] if config.generation.answers_by == "both" else judged
    state = dataclasses.replace(state, answering=_observe_answers(state.answering, drawn, config))
    # 3.
    gate_state, gated = _ask_gate(_observe_verdicts(state.gate, judged), taught, learner)
    gate_state, gated_second = _ask_gate(gate_state, [one.taught for one in second], learner)
    lagging = [index for index, one in gated.items() if one.decision.distil]
    lagging_second = [index for index, one in gated_second.items() if one.decision.distil]
    feedback = gather_samples([gated[index].sample for index in lagging])
    feedback += gather_samples([gated_second[index].sample for index in lagging_second])
    weights = loss_weights(gate_state, learner, number)
    gate_state = gate.set_trust(gate_state, learner.progress(number + 1), config.gate)
    written = sum(ranks.gather([expert_tokens([*judged, *(one.judged for one in second)])]))
    state = dataclasses.replace(state, gate=gate_state, spent=state.spent + written)
    # 4. and 5.
    ahead: Begun | None = None
    if config.learns_last:
        (finished,) = learner.carry_on([_second_halves(number, judged, (), learner)])
        solutions = _solutions(finished, lagging, learner)
        own = _lessons(finished, taught, lagging, learner)
        state, updates = _learn_now(state, [*feedback, *solutions], weights, learner, own)
        after = _measure_learned(gated, lagging if updates else [], learner, number)
        state, decision = _after_updates(state, updates, learner, kept=True)
    else:
        state, updates = _learn_now(state, feedback, weights, learner, None)
        after = _measure_learned(gated, lagging if updates else [], learner, number)
        state, decision = _after_updates(state, updates, learner, kept=not following)
        # Where the expert was told the right answer, what the student has of it stays out of this.
        again = [index for index in lagging if updates and reviewed[index].again is None]
        groups = [_second_halves(number, judged, again, learner)]
        groups += _first_halves(state, following, learner) if following else []
        finished, *next_ones = learner.carry_on(groups)
        ahead = Begun(*next_ones) if following else None
        solutions = _solutions(finished, lagging, learner)
        state = dataclasses.replace(state, replay=_added(state.replay, solutions, learner))
    _check_feedback([one.judged.student for one in finished], state.batch, config)

    trusted = [gate.stands_alone(before.gate, one.student.confidence) for one in judged]
    rows = [
        episode_row(
            one,
            first + index,
            _gate_row(gated.get(index), after.get(index), reviewed[index], trusted[index]),
            reviewed[index].to_json(),
        )
        for index, one in enumerate(finished)
    ]
    for index, one in enumerate(second):
        decided = _gate_row(gated_second.get(index), None, one, False)
        rows[index] = with_second(rows[index], one.judged, decided, one.to_json())
    learned = sum(ranks.gather([len(lagging) + len(lagging_second)]))
    metrics = _metrics(state, learned, weights, updates, decision, begin, written)
    options = warmed(config.generation, before.answering)
    metrics["answer_temperature"] = options.answer_temperature
    outcomes = ranks.gather([one.outcome for one in (*reviewed, *second)])
    metrics["expert_verdicts"] = tally(outcomes)
    rows = ranks.gather(rows)
    if (accepted := accepted_count(rows))["n"]:
        metrics["accepted"] = accepted
    done = BatchResult(state, rows, metrics, [*feedback, *solutions], ahead)
    return done, updates


def _seeds(number: int, learner: Learner) -> Seeds:
    """The seeds of a batch's draws."""
    seed = learner.config.episode.seed
    return lambda step: derive_seed(seed, number, ranks.step_name(step))


def _first_halves(state: RunState, problems: Sequence[Problem], learner: Learner) -> list[Group]:
    """Steps 1 and 2 of a batch's episodes; and with ``answers_by`` ``both`` of the student's.

    Args:
        state: where the run stands before the batch.
        problems: the batch's.
        learner: the run's.
    """
    pair, config, number = learner.pair, learner.config, state.batch
    options, problems = warmed(config.generation, state.answering), ranks.share(problems)
    seeds, on_tokens = _seeds(number, learner), learner.on_tokens(number)

    def needs_expert(answered: Answered, student: StudentFeedback) -> bool:
        # Where there is no trust, and for an audit.
        trusted = gate.stands_alone(state.gate, student.confidence)
        return _audited(answered.problem, config) or not trusted

    def halves(answers: Iterable[Turns[Answered]]) -> list[Turns[Reviewed]]:
        return [first_half(pair, one, config, needs_expert) for one in answers]

    first = halves(write_first_answer(pair, one, options) for one in problems)
    second: list[Turns[Reviewed]] = []
    # The student's own are only there to learn from.
    if options.answers_by == "both" and not state.gate.frozen:
        second = halves(write_student_answer(pair, one, options) for one in problems)
    return [
        Group(first, seeds, on_tokens),
        Group(second, lambda step: seeds(f"second {step}"), on_tokens),
    ]


def _second_halves(
    number: int, judged: Sequence[Judged], again: Collection[int], learner: Learner
) -> Group:
    """Steps 4, its end, and 5 of a batch's episodes.

    Args:
        number: the batch's.
        judged: its episodes after step 2.
        again: those on which the student learned and gives its feedback again.
        learner: the run's.
    """
    works = [
        second_half(learner.pair, one, learner.config, again=index in again)
        for index, one in enumerate(judged)
    ]
    return Group(works, _seeds(number, learner), learner.on_tokens(number))


def expert_tokens(judged: Sequence[Judged]) -> int:
    """Tokens of the expert's feedbacks."""
    return sum(sum(one.expert.usage.tokens.values()) for one in judged if one.expert)


def _audited(problem: Problem, config: Config) -> bool:
    return gate.audited(problem.id, config.episode.seed, config.gate)


def _observe_answers(state: Answering, judged: Sequence[Judged], config: Config) -> Answering:
    scores = [one.expert.feedback.written_score for one in judged if one.expert]
    return observe(state, ranks.gather(scores), config.generation)


def _observe_verdicts(state: gate.GateState, judged: Sequence[Judged]) -> gate.GateState:
    """The gate's state after both verdicts on each answer, the expert's as it gave it.

    What is only learned from is none of it: trust is about the answers that episodes go on with.
    """
    verdicts = [
        (one.student.confidence, one.student.verdict, one.expert.feedback.written_score)
        for one in judged
        if one.expert is not None
    ]
    for confidence, student, expert in ranks.gather(verdicts):
        state = gate.observe_scores(state, confidence, student, expert)
    return state


def _ask_gate(
    state: gate.GateState, judged: Sequence[Judged], learner: Learner
) -> tuple[gate.GateState, dict[int, _Gated]]:
    """Step 3: the gate sees every feedback of the expert, in order; those of all ranks.

    Args:
        state: before it.
        judged: episodes after step 2.
        learner: the run's.

    Returns:
        The gate's state after them, and its decision by the episode's index in the batch.
    """
    config = learner.config
    samples = {
        index: sample_of(
            learner.pair,
            one,
            config.losses,
            on_policy=_share(one.problem.id, config.episode.seed)
            < config.losses.on_policy_fraction,
            cache=learner.cache,
            apart=config.training.replay > 0,
        )
        for index, one in enumerate(judged)
        if one.expert is not None
    }
    measured = learner.losses(list(samples.values()))
    own = [
        _Reading(
            losses,
            sample.expert_score,
            judged[index].student.head_score,
            nothing_said=_says_nothing(judged[index]),
            audited=_audited(judged[index].problem, config),
        )
        for (index, sample), losses in zip(samples.items(), measured, strict=True)
    ]
    decisions = []
    for rank, rows in enumerate(ranks.gather([[dataclasses.astuple(one) for one in own]])):
        for reading in (_Reading(*row) for row in rows):
            decision = _decide(state, reading, config)
            if rank == ranks.index():
                decisions.append(decision)
            if not state.frozen or reading.audited:
                state = gate.observe_sample(state, reading.losses, config.gate)
    return state, {
        index: _Gated(sample, losses, decision)
        for (index, sample), losses, decision in zip(
            samples.items(), measured, decisions, strict=True
        )
    }


def _says_nothing(judged: Judged) -> bool:
    """Whether the expert's feedback ended within its thought."""
    assert judged.expert is not None
    return bool(not judged.expert.feedback.text and judged.expert.feedback.opening)


def _share(problem_id: str, seed: int) -> float:
    digest = hashlib.sha256(f"on-policy/{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _decide(state: gate.GateState, reading: _Reading, config: Config) -> gate.TriggerDecision:
    """The gate's decision; a sample that overflowed in the expert is not learned from."""
    if reading.nothing_said:
        return gate.TriggerDecision(False, "the expert's thought has no feedback after it")
    for name, value in reading.losses.items():
        if not math.isfinite(value):
            return gate.TriggerDecision(False, f"the {name} loss of this sample is not finite")
    scores = reading.expert_score, reading.student_score
    return gate.trigger(state, *scores, reading.losses, config.gate)


def _solutions(
    finished: Sequence[Finished], lagging: Sequence[int], learner: Learner
) -> list[Sample]:
    """The right final answers to learn from, where the student lagged; those of all ranks."""
    if not learner.config.losses.learns_solutions:
        return []
    samples = []
    for one in (finished[index] for index in lagging):
        if not one.is_correct:
            continue
        sample = solution_of(
            learner.pair, one.problem, one.final, learner.config.losses, cache=learner.cache
        )
        if name := _lost(sample, learner):
            text = f"the {name} loss on a right solution of {one.problem.id} is not finite"
            learner.report(Warned(f"{text}: it is not learned from"))
        else:
            samples.append(sample)
    return gather_samples(samples)


def _lost(sample: Sample, learner: Learner) -> str | None:
    """A loss on a sample that overflowed in the expert, which would void every update it is in."""
    if sample.expert.are_finite:
        return None
    (losses,) = learner.losses([sample])
    return next((name for name, value in losses.items() if not math.isfinite(value)), None)


def _lessons(
    finished: Sequence[Finished],
    taught: Sequence[Judged],
    lagging: Sequence[int],
    learner: Learner,
) -> Lessons | None:
    """What the student learns from itself; ``None`` without a ``student_context``."""
    context = learner.config.losses.student_context
    if context == "none":
        return None
    return lessons(
        [dataclasses.replace(finished[index], judged=taught[index]) for index in lagging], context
    )


def loss_weights(state: gate.GateState, learner: Learner, number: int) -> dict[str, float]:
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


def _learn_now(
    state: RunState,
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    learner: Learner,
    own: Lessons | None,
) -> tuple[RunState, list[Update]]:
    """Step 4: the batch's optimiser steps, and the state with what is remembered after them.

    Args:
        state: before them.
        samples: of this batch; what is fresh in ``state`` is learned from with them, and earlier
            ones are learned from again.
        weights: what each loss counts.
        learner: the run's.
        own: what the student learns from itself.
    """
    config, number = learner.config, state.batch
    replay = _added(state.replay, samples, learner)
    new = replay.fresh()
    if not samples:
        return dataclasses.replace(state, replay=replay), []
    if config.generation.batching == CONTINUOUS:
        # Dropout draws the same numbers whoever wrote before.
        mx.random.seed(_seeds(number, learner)("distil"))
    rng = np.random.default_rng(derive_seed(config.episode.seed, number, "replay"))
    scaled = {name: weights[name] * state.scales[name] for name in config.losses.losses}
    updates, lags, fresh = [], {}, set(new)
    for step, lines in enumerate(choose(replay, new, config.training, rng)):
        texts = [
            sample if line in fresh else sample.without_own()
            for line, sample in zip(lines, learner.memory.of(lines), strict=True)
        ]
        done = _step(learner, texts, scaled, (number, step), own)
        updates.append(done)
        for line, text, losses in zip(lines, texts, done.each, strict=True):
            lags[line] = _lag(text, losses, scaled)
        learner.on_tokens(number)("distil", done.tokens)
    replay = replay.learned(lags, config.training.replay_size if config.training.replay else 0)
    learner.memory.keep(replay)
    return dataclasses.replace(state, replay=replay), updates


def _lag(sample: Sample, losses: Mapping[str, float], scaled: Mapping[str, float]) -> float:
    """How far the student lags on what of a sample can be learned from again."""
    again = [name for name in losses if not (sample.own and LOSSES[name].trains_head)]
    return sum(scaled[name] * losses[name] for name in again)


def _step(
    learner: Learner,
    samples: Sequence[Sample],
    scaled: Mapping[str, float],
    at: tuple[int, int],
    own: Lessons | None = None,
) -> Update:
    """One optimiser step; ``at`` is the batch and the step in it, from 0."""
    pair, config = learner.pair, learner.config
    done = (at[0] + at[1] / config.training.kd_steps) / learner.batches
    set_rates(learner.optimizer, config.training, done)

    def itself() -> tuple[Any, float]:
        assert own is not None
        return self_distillation_loss(pair.student_lm, own, config.training)

    return update(
        pair,
        learner.optimizer,
        samples,
        scaled,
        config.losses,
        config.training,
        itself if own is not None and own.attempts else None,
    )


def _added(replay: Replay, samples: Sequence[Sample], learner: Learner) -> Replay:
    """What is remembered with samples that the next update is to learn from."""
    after = replay.added(samples, fresh=True)
    learner.memory.samples.update(zip(range(replay.lines, after.lines), samples, strict=True))
    return after


def _measure_learned(
    gated: Mapping[int, _Gated], learned: Sequence[int], learner: Learner, number: int
) -> dict[int, dict[str, float]]:
    """With ``measure_after``, the losses on what was learned from; by the episode's index."""
    if not learner.config.training.measure_after:
        return {}
    losses_after = learner.losses([gated[index].sample for index in learned])
    after = dict(zip(learned, losses_after, strict=True))
    for losses in after.values():
        check_finite(losses, number + 1, learner.config)
    return after


def _after_updates(
    state: RunState, updates: Sequence[Update], learner: Learner, *, kept: bool
) -> tuple[RunState, gate.StopDecision | None]:
    """The state after a batch's updates, with a probe evaluation where one is due.

    Args:
        state: before them.
        updates: the batch's.
        learner: the run's.
        kept: whether the student can be kept as it is now, and so be the best one.
    """
    config = learner.config
    state = dataclasses.replace(
        state,
        batch=state.batch + 1,
        distilled=state.distilled + bool(updates),
    )
    if not updates or state.distilled % config.episode.probe_every:
        return state, None
    losses = learner.probe.losses(learner.pair, config)
    check_finite(losses, state.batch, config)
    gate_state, decision = gate.observe_probe(
        state.gate, losses, config.gate, cost=float(state.spent)
    )
    state = dataclasses.replace(state, gate=gate_state, spent=0)
    return with_probe(state, losses, kept=kept), decision


def rehearse_batch(state: RunState, rows: Sequence[SampleRow], learner: Learner) -> BatchResult:
    """Learn once more from what a batch of episodes gave.

    Args:
        state: where the run stands.
        rows: the batch's lines of ``samples.jsonl``.
        learner: the run's.
    """
    begin, number = time.perf_counter(), state.batch
    weights = loss_weights(state.gate, learner, number)
    updates: list[Update] = []
    if not state.gate.frozen:
        again = samples_again(rows, learner.pair, learner.config, learner.cache)
        samples = [sample.without_own() for sample in again]
        scaled = {name: weights[name] * state.scales[name] for name in weights}
        training, seed = learner.config.training, learner.config.episode.seed
        rng = np.random.default_rng(derive_seed(seed, number, "replay"))
        steps = choose(Replay(), range(len(samples)), training, rng) if samples else []
        for step, chosen in enumerate(steps):
            updates.append(_step(learner, [samples[k] for k in chosen], scaled, (number, step)))
            learner.on_tokens(number)("distil", updates[-1].tokens)
    state, decision = _after_updates(state, updates, learner, kept=True)
    metrics = _metrics(state, len(rows), weights, updates, decision, begin, 0)
    return BatchResult(state, [], metrics, [])


def samples_again(
    rows: Sequence[SampleRow], pair: Pair, config: Config, cache: TeacherCache | None
) -> list[Sample]:
    """Samples from their lines of ``samples.jsonl``: the expert reads them again."""
    return gather_samples([_again(row, pair, config, cache) for row in ranks.share(rows)])


def _again(row: SampleRow, pair: Pair, config: Config, cache: TeacherCache | None) -> Sample:
    prompt, target = tuple(row["prompt"]), tuple(row["target"])
    losses, begin = config.losses, Conversation()
    if pair.shared is None:
        reads = tuple(row.get("expert_prompt", prompt))
        outputs = read_text(pair, begin, reads, target, losses, cache)
    else:
        expert_text = tuple(row["expert_prompt"]), tuple(row["expert_target"])
        outputs, _ = read_both(pair, begin, *expert_text, target, losses, cache)
    return Sample.from_json(row, outputs)


def _metrics(
    state: RunState,
    lagging: int,
    weights: Mapping[str, float],
    updates: Sequence[Update],
    decision: gate.StopDecision | None,
    begin: float,
    written: int,
) -> MetricsRow:
    """The batch's line of ``metrics.jsonl``; ``state`` is that after it."""
    return {
        "batch": state.batch - 1,
        "lagging": lagging,
        "weights": weights,
        "updates": [update_row(one) for one in updates],
        "probe": state.probe_last if decision else None,
        "stop": stop_row(decision),
        "frozen": state.gate.frozen,
        "trust": trust_row(state.gate.running.trust),
        "expert_tokens": written,
        "answer_temperature": None,
        "distil_seconds": round(sum(one.seconds for one in updates), 3),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _gate_row(
    gated: _Gated | None, after: Mapping[str, float] | None, reviewed: Reviewed, trusted: bool
) -> GateRow:
    if gated is None:
        reason = REASONS[reviewed.outcome] if reviewed.outcome else "the student stands alone"
        return {"distilled": False, "reason": reason, "trusted": trusted}
    return {
        "distilled": gated.decision.distil,
        "reason": gated.decision.reason,
        "trusted": trusted,
        "on_policy": gated.sample.on_policy,
        "losses_before": {name: finite(value) for name, value in gated.losses.items()},
        "losses_after": after,
    }


def _check_feedback(given: Sequence[StudentFeedback], batch: int, config: Config) -> None:
    """Stop a run whose student is lost, before its rows are written; all ranks raise."""
    numbers = [(one.logprob, one.head_score) for one in given]
    for logprob, score in ranks.gather(numbers):
        if not math.isfinite(logprob):
            raise diverged("log-probabilities are", batch, config)
        if score is not None and not math.isfinite(score):
            raise diverged("score is", batch, config)
