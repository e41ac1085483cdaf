"""Step 4 of a batch: the student learns, from what lags and from earlier samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.distill import Update, set_rates, update
from mlx_fd.feedback.loss_terms import LOSSES
from mlx_fd.feedback.phases import PhaseSchedule, combined, phase_weights
from mlx_fd.feedback.samples import Sample, gather_samples, solution_of
from mlx_fd.feedback.stages import Finished, Judged
from mlx_fd.runs.events import Warned
from mlx_fd.training.checkpoint import RunState, with_probe
from mlx_fd.training.diverged import check_finite
from mlx_fd.training.gating import Gated
from mlx_fd.training.learner import Learner, seeds_of
from mlx_fd.training.replay import Replay, choose
from mlx_fd.training.selfdistill.in_loop import Lessons, lessons, self_distillation_loss


def solutions_of(
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


def lessons_of(
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


def learn_now(
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
    replay = remembered(state.replay, samples, learner)
    new = replay.fresh()
    if not samples:
        return dataclasses.replace(state, replay=replay), []
    if config.generation.batching == CONTINUOUS:
        # Dropout draws the same numbers whoever wrote before.
        mx.random.seed(seeds_of(number, learner)("distil"))
    rng = np.random.default_rng(derive_seed(config.episode.seed, number, "replay"))
    scaled = {name: weights[name] * state.scales[name] for name in config.losses.losses}
    updates, lags, fresh = [], {}, set(new)
    for step, lines in enumerate(choose(replay, new, config.training, rng)):
        texts = [
            sample if line in fresh else sample.without_own()
            for line, sample in zip(lines, learner.memory.of(lines), strict=True)
        ]
        done = one_step(learner, texts, scaled, (number, step), own)
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


def one_step(
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


def remembered(replay: Replay, samples: Sequence[Sample], learner: Learner) -> Replay:
    """What is remembered with samples that the next update is to learn from."""
    after = replay.added(samples, fresh=True)
    learner.memory.samples.update(zip(range(replay.lines, after.lines), samples, strict=True))
    return after


def measure_learned(
    gated: Mapping[int, Gated], learned: Sequence[int], learner: Learner, number: int
) -> dict[int, dict[str, float]]:
    """With ``measure_after``, the losses on what was learned from; by the episode's index."""
    if not learner.config.training.measure_after:
        return {}
    losses_after = learner.losses([gated[index].sample for index in learned])
    after = dict(zip(learned, losses_after, strict=True))
    for losses in after.values():
        check_finite(losses, number + 1, learner.config)
    return after


def after_updates(
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
