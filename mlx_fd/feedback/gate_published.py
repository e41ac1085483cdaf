"""The published gate, for comparison: AdaptiveWeightedKDPolicyEMA of the original method.

Its rule, unchanged, as a pure state machine (docs/methods.md, variant A); gains in per cent:

- Per task sample (:func:`should_skip`): the sample joins a window of ten, whose mean is the
  baseline; gain = 100 (baseline - loss) / baseline. Each loss has a threshold, an EMA of its gains
  that starts at 10. Skip where every loss reaches its threshold or is below 0.01.
- Per distilled batch (:func:`update_weights`): a batch key remembers its first losses and a
  baseline that follows the loss within 10 %. Skip where every loss passes against that baseline, or
  against its first losses on a ladder of 10, 20, .. 80 %; freeze for good where every loss is 90 %
  below the mean of all keys' first losses.

Mended, because they are slips of coding and not of the rule: a sample joined the window twice; the
window grew without bound after the first call; a loss that was switched off late left vectors of
two lengths (losses have names here, and a missing one neither passes nor blocks, and counts 1 / n).

Against a baseline that moves along with it, a loss never gains more than 9.1 % (a tenth of 1.1).
The freeze looks at the first losses instead, needs 90 % of them, and takes a single lucky value as
proof. What that does on curves is in tests/feedback/test_gate.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MINIMUM_GAIN = 10.0
STOP_GAIN = 90.0
EMA_SHARE_OF_NEW = 0.1
WINDOW = 10
WINDOW_FOR_DISTANCES = 5
LADDER = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0)
NEGLIGIBLE_LOSS = 1e-2

Vector = dict[str, float]


@dataclass(frozen=True)
class BatchLosses:
    """What is remembered of a batch key: its first losses and its moving baseline."""

    first: Vector
    baseline: Vector


@dataclass(frozen=True)
class PublishedState:
    """All that the published gate remembers.

    Attributes:
        window: losses of the last ten samples.
        baseline: their mean, loss by loss.
        thresholds: EMA of each loss's gains, in per cent.
        previous: losses of the sample before.
        weights: what each loss counts; sum 1.
        batches: by batch key.
        rung: place on the ladder.
    """

    window: tuple[Vector, ...] = ()
    baseline: Vector = field(default_factory=dict)
    thresholds: Vector = field(default_factory=dict)
    previous: Vector = field(default_factory=dict)
    weights: Vector = field(default_factory=dict)
    batches: dict[str, BatchLosses] = field(default_factory=dict)
    rung: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PublishedState:
        """What :func:`dataclasses.asdict` gave, also after a trip through JSON text."""
        batches = {key: BatchLosses(**batch) for key, batch in value["batches"].items()}
        return cls(**{**value, "window": tuple(value["window"]), "batches": batches})


def initial_state(names: Sequence[str]) -> PublishedState:
    """The state before any observation, all losses counting the same."""
    return PublishedState(weights={name: 1 / len(names) for name in names})


def should_skip(state: PublishedState, losses: Vector) -> tuple[PublishedState, bool]:
    """A task sample, before any update on it.

    Args:
        state: the state.
        losses: the sample's finite losses.

    Returns:
        The new state, and whether to leave the student as it is.
    """
    if not losses:
        return state, False
    if not state.window:
        return _begin(state, losses), False
    window = (*state.window, losses)[-WINDOW:]
    baseline = _mean(window)
    gains = {name: _gain(value, baseline[name]) for name, value in losses.items()}
    thresholds = {
        name: max(
            0.0,
            EMA_SHARE_OF_NEW * gain
            + (1 - EMA_SHARE_OF_NEW) * state.thresholds.get(name, MINIMUM_GAIN),
        )
        for name, gain in gains.items()
    }
    lagging = _lagging(losses, gains, thresholds)
    new = replace(
        state,
        window=window,
        baseline=baseline,
        thresholds={**state.thresholds, **thresholds},
        previous={**state.previous, **losses},
        weights=_normalised(_softmax_of_rise(losses, state.previous), lagging, state.weights),
    )
    return new, not lagging


def update_weights(
    state: PublishedState, losses: Vector, key: str
) -> tuple[PublishedState, bool, bool]:
    """A batch, after an update on it.

    Args:
        state: the state.
        losses: the batch's finite losses.
        key: names the batch.

    Returns:
        The new state, whether the batch passes (which ends the round of updates), and whether the
        student is to be frozen for good.
    """
    if not losses:
        return state, False, False
    if not state.window:
        return _begin(state, losses), False, False
    batch = state.batches.get(key, BatchLosses(first=losses, baseline=state.baseline))
    batch = BatchLosses(
        first={**losses, **batch.first},
        baseline={
            **batch.baseline,
            **{n: _recalibrated(batch.baseline.get(n, v), v) for n, v in losses.items()},
        },
    )
    batches = {**state.batches, key: batch}
    mean_first = _mean([item.first for item in batches.values()])

    against_baseline = {n: _gain(v, batch.baseline[n]) for n, v in losses.items()}
    against_first = {n: _gain(v, batch.first[n]) for n, v in losses.items()}
    against_mean_first = {n: _gain(v, mean_first[n]) for n, v in losses.items()}
    thresholds = {name: state.thresholds.get(name, MINIMUM_GAIN) for name in losses}
    lagging = _lagging(losses, against_baseline, thresholds)
    climbed = not _lagging(losses, against_first, dict.fromkeys(losses, LADDER[state.rung]))
    freeze = not _lagging(losses, against_mean_first, dict.fromkeys(losses, STOP_GAIN))

    if len(state.window) >= WINDOW_FOR_DISTANCES:
        shares = {name: abs(against_baseline[name] - thresholds[name]) for name in losses}
    else:
        shares = _softmax_of_rise(losses, state.previous)
    new = replace(
        state,
        batches=batches,
        rung=min(state.rung + climbed, len(LADDER) - 1),
        weights=_normalised(shares, lagging, state.weights),
    )
    return new, not lagging or climbed or freeze, freeze


def _begin(state: PublishedState, losses: Vector) -> PublishedState:
    return replace(
        state,
        window=(losses,),
        baseline=losses,
        thresholds=dict.fromkeys(losses, MINIMUM_GAIN),
        previous=losses,
    )


def _lagging(losses: Vector, gains: Vector, thresholds: Vector) -> list[str]:
    """The losses that neither gained their threshold nor are negligible."""
    return [
        name
        for name, value in losses.items()
        if gains[name] < thresholds[name] and value >= NEGLIGIBLE_LOSS
    ]


def _recalibrated(baseline: float, loss: float) -> float:
    """The baseline, kept within 10 % of the loss, else set 10 % below it."""
    margin = MINIMUM_GAIN / 100
    floor = loss * (1 - margin)
    keep = loss < baseline <= loss * (1 + margin) or floor <= baseline < loss
    return baseline if keep else floor


def _gain(loss: float, baseline: float) -> float:
    return 100 * (baseline - loss) / max(abs(baseline), 1e-8)


def _mean(vectors: Sequence[Vector]) -> Vector:
    """The mean of each loss over the vectors that have it."""
    names = {name: None for vector in vectors for name in vector}
    columns = {name: [v[name] for v in vectors if name in v] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def _softmax_of_rise(losses: Vector, previous: Vector) -> Vector:
    """Shares by how much each loss rose since the last sample, in the losses' own units."""
    rises = {name: value - previous.get(name, value) for name, value in losses.items()}
    highest = max(rises.values())
    return {name: math.exp(rise - highest) for name, rise in rises.items()}


def _normalised(shares: Vector, lagging: Sequence[str], names: Mapping[str, float]) -> Vector:
    """The lagging losses' shares scaled to sum 1, nothing for the others; equal where none lags.

    A loss that was not observed (of solutions, in a feedback) keeps what it has where all count the
    same, 1 / n: nothing is known of it, and at 0 it would never be learned.
    """
    missing = dict.fromkeys((name for name in names if name not in shares), 1 / len(names))
    left = 1 - sum(missing.values())
    total = sum(shares[name] for name in lagging)
    if total <= 1e-12:
        chosen: Sequence[str] = lagging or list(shares)
        found = dict.fromkeys(chosen, left / len(chosen))
    else:
        found = {name: left * shares[name] / total for name in lagging}
    return {name: missing.get(name, found.get(name, 0.0)) for name in names}
