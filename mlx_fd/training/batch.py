"""One batch of episodes, in the order of the method; and a batch that is learned from again.

:func:`run_batch` reads like :mod:`mlx_fd.feedback.episode`:

1. answer                                   :func:`first_answers`
2. student's and expert's feedback          :func:`_judge`
3. the gate                                 :func:`_ask_gate`
4. merge, revise, criticise, final answer   :func:`merge_and_revise`
5. learn, and measure what it brought       :func:`_learn`, :func:`_measure_learned`
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.optimizers as optim

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.feedback import gate
from mlx_fd.feedback.distill import Update, measure, update
from mlx_fd.feedback.episode import (
    Answered,
    Finished,
    Judged,
    OnTokens,
    derive_seed,
    episode_row,
    expert_feedback,
    first_answers,
    judge,
    merge_and_revise,
    student_feedback,
)
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.phases import PhaseSchedule, combined, phase_weights
from mlx_fd.feedback.samples import Sample, read_both, read_text, sample_of, solution_of
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.models.conversation import Conversation
from mlx_fd.problems import Problem
from mlx_fd.runs.events import Event, Step
from mlx_fd.runs.records import EpisodeRow, GateRow, MetricsRow, SampleRow
from mlx_fd.training.checkpoint import RunState, finite, stop_row, update_row, with_probe
from mlx_fd.training.probe import Probe
from mlx_fd.training.selfdistill.in_loop import Lessons, lessons, self_distillation_loss

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
    """

    pair: Pair
    probe: Probe
    optimizer: optim.Optimizer
    config: Config
    report: Report
    batches: int
    cache: TeacherCache | None

    def on_tokens(self, batch: int) -> OnTokens:
        """What reports the tokens of a batch's steps."""
        return report_steps(self.report, batch)

    def losses(self, sample: Sample) -> dict[str, float]:
        """The student's losses on one sample, as it is now."""
        pair = self.pair
        return measure(pair.student, pair.expert, [sample], self.config.losses, pair.vocab, 1)


def report_steps(report: Report, batch: int) -> OnTokens:
    """What reports the tokens of a batch's steps."""
    return lambda step, tokens: report(Step(batch, step, tokens))


@dataclass(frozen=True)
class BatchResult:
    """A batch of episodes that is done.

    Attributes:
        state: where the run stands after it.
        rows: its lines of ``episodes.jsonl``; none in a later epoch.
        metrics: its line of ``metrics.jsonl``.
        samples: what was learned from.
    """

    state: RunState
    rows: list[EpisodeRow]
    metrics: MetricsRow
    samples: list[Sample]


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


def run_batch(state: RunState, problems: Sequence[Problem], learner: Learner) -> BatchResult:
    """One batch of episodes: steps 1 to 5."""
    begin = time.perf_counter()
    pair, config, number = learner.pair, learner.config, state.batch
    on_tokens = learner.on_tokens(number)

    def seeds(step: str) -> int:
        return derive_seed(config.episode.seed, number, step)

    # 1. and 2. Nothing but the result keeps the answers' caches.
    judged = _judge(
        first_answers(pair, problems, config.generation, seeds("answer"), on_tokens),
        state.gate,
        learner,
        seeds,
        on_tokens,
    )
    # 3.
    gate_state, gated = _ask_gate(state.gate, judged, learner)
    # 4. Before the student learns: it can learn from what this ends in.
    finished = merge_and_revise(pair, judged, config.generation, config.episode, seeds, on_tokens)
    # 5.
    lagging = [index for index, one in gated.items() if one.decision.distil]
    samples = _samples(gated, finished, lagging, learner)
    weights = loss_weights(gate_state, learner, number)
    updates = _learn(
        learner, samples, weights, state.scales, on_tokens, _lessons(finished, lagging, learner)
    )
    after = _measure_learned(gated, lagging if updates else [], learner, number)

    state, decision = _after_updates(dataclasses.replace(state, gate=gate_state), updates, learner)
    first = number * config.generation.batch_size
    rows = [
        episode_row(one, first + index, _gate_row(gated.get(index), after.get(index)))
        for index, one in enumerate(finished)
    ]
    metrics = _metrics(state, len(lagging), weights, updates, decision, begin)
    return BatchResult(state, rows, metrics, samples if updates else [])


def _audited(problem: Problem, config: Config) -> bool:
    return gate.audited(problem.id, config.episode.seed, config.gate)


def _judge(
    answered: Sequence[Answered],
    state: gate.GateState,
    learner: Learner,
    seeds: Callable[[str], int],
    on_tokens: OnTokens,
) -> list[Judged]:
    """Step 2: the student's feedback, then the expert's where the student does not stand alone."""
    pair, config = learner.pair, learner.config
    students = student_feedback(
        pair, answered, config.generation, seeds("student_feedback"), on_tokens
    )
    asked = [
        index
        for index, (one, student) in enumerate(zip(answered, students, strict=True))
        if _audited(one.problem, config)
        or not gate.stands_alone(state, student.head_score, config.gate)
    ]
    experts = expert_feedback(
        pair,
        [answered[index] for index in asked],
        config.generation,
        seeds("expert_feedback"),
        on_tokens,
    )
    return judge(answered, students, dict(zip(asked, experts, strict=True)))


def _ask_gate(
    state: gate.GateState, judged: Sequence[Judged], learner: Learner
) -> tuple[gate.GateState, dict[int, _Gated]]:
    """Step 3: the gate sees every feedback of the expert, in order.

    Returns:
        The gate's state after them, and its decision by the episode's index in the batch.
    """
    config, gated = learner.config, {}
    for index, one in enumerate(judged):
        if one.expert is None:
            continue
        share = _share(one.problem.id, config.episode.seed)
        sample = sample_of(
            learner.pair,
            one,
            config.losses,
            on_policy=share < config.losses.on_policy_fraction,
            cache=learner.cache,
        )
        losses, score = learner.losses(sample), one.student.head_score
        if not one.expert.feedback.text and one.expert.feedback.opening:
            decision = gate.TriggerDecision(False, "the expert's thought has no feedback after it")
        else:
            decision = _decide(state, sample, score, losses, config)
        gated[index] = _Gated(sample, losses, decision)
        state = gate.observe_scores(state, score, sample.expert_score, config.gate)
        if not state.frozen or _audited(one.problem, config):
            state = gate.observe_sample(state, losses, config.gate)
    return state, gated


def _share(problem_id: str, seed: int) -> float:
    digest = hashlib.sha256(f"on-policy/{seed}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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


def _samples(
    gated: Mapping[int, _Gated],
    finished: Sequence[Finished],
    lagging: Sequence[int],
    learner: Learner,
) -> list[Sample]:
    """What the student learns from: feedback where it lags, and right final answers there."""
    samples = [gated[index].sample for index in lagging]
    if learner.config.losses.learns_solutions:
        samples += [
            solution_of(
                learner.pair,
                one.problem,
                one.final,
                learner.config.losses,
                cache=learner.cache,
            )
            for one in (finished[index] for index in lagging)
            if one.is_correct
        ]
    return samples


def _lessons(
    finished: Sequence[Finished], lagging: Sequence[int], learner: Learner
) -> Lessons | None:
    """What the student learns from itself; ``None`` without a ``student_context``."""
    context = learner.config.losses.student_context
    if context == "none":
        return None
    return lessons([finished[index] for index in lagging], context)


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


def _learn(
    learner: Learner,
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    on_tokens: OnTokens,
    own: Lessons | None = None,
) -> list[Update]:
    """Step 5: the batch's optimiser steps; ``own`` is what the student learns from itself."""
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
        on_tokens("distil", sum(len(sample.target) for sample in samples))
    return done


def _measure_learned(
    gated: Mapping[int, _Gated], learned: Sequence[int], learner: Learner, number: int
) -> dict[int, dict[str, float]]:
    """The losses on what was learned from, after the updates; by the episode's index."""
    after = {index: learner.losses(gated[index].sample) for index in learned}
    for losses in after.values():
        check_finite(losses, number + 1, learner.config)
    return after


def _after_updates(
    state: RunState, updates: Sequence[Update], learner: Learner
) -> tuple[RunState, gate.StopDecision | None]:
    """The state after a batch's updates, with a probe evaluation where one is due."""
    config = learner.config
    state = dataclasses.replace(
        state,
        batch=state.batch + 1,
        distilled=state.distilled + bool(updates),
        spent=state.spent + len(updates),
    )
    if not updates or state.distilled % config.episode.probe_every:
        return state, None
    losses = learner.probe.losses(learner.pair, config)
    check_finite(losses, state.batch, config)
    gate_state, decision = gate.observe_probe(
        state.gate, losses, config.gate, cost=float(state.spent)
    )
    state = dataclasses.replace(state, gate=gate_state, spent=0)
    return with_probe(state, losses), decision


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
        samples = [_sample_again(row, learner) for row in rows]
        updates = _learn(learner, samples, weights, state.scales, learner.on_tokens(number))
    state, decision = _after_updates(state, updates, learner)
    return BatchResult(state, [], _metrics(state, len(rows), weights, updates, decision, begin), [])


def _sample_again(row: SampleRow, learner: Learner) -> Sample:
    prompt, target = tuple(row["prompt"]), tuple(row["target"])
    pair, losses, begin = learner.pair, learner.config.losses, Conversation()
    if pair.shared is None:
        outputs = read_text(pair, begin, prompt, target, losses, learner.cache)
    else:
        theirs = tuple(row["expert_prompt"]), tuple(row["expert_target"])
        outputs, _ = read_both(pair, begin, *theirs, target, losses, learner.cache)
    return Sample.from_json(row, outputs)


def _metrics(
    state: RunState,
    lagging: int,
    weights: Mapping[str, float],
    updates: Sequence[Update],
    decision: gate.StopDecision | None,
    begin: float,
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
        "sure": {"agreed": sum(state.gate.sure), "of": len(state.gate.sure)},
        "distil_seconds": round(sum(one.seconds for one in updates), 3),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _gate_row(gated: _Gated | None, after: Mapping[str, float] | None) -> GateRow:
    if gated is None:
        return {"distilled": False, "reason": "the student stands alone"}
    return {
        "distilled": gated.decision.distil,
        "reason": gated.decision.reason,
        "on_policy": gated.sample.on_policy,
        "losses_before": {name: finite(value) for name, value in gated.losses.items()},
        "losses_after": after,
    }


def check_finite(losses: Mapping[str, float], batch: int, config: Config) -> None:
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
