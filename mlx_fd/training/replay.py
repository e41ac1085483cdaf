"""What the student learned from before, to learn from again: each update mixes it with what is new.

What decides is pure and in the checkpoint (:class:`Replay`): which lines of ``samples.jsonl`` are
remembered, how far the student lagged on each when it last learned from it, and which of them it
has not learned from yet. The samples themselves (:class:`Memory`) are made again from the log after
a resume; the expert then reads their texts as it did first, from the prompt's beginning, so that
they come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_fd.config import TrainingOptions
from mlx_fd.feedback.samples import Sample

# A sample on which nothing lags is drawn seldom, and not never: it may be forgotten.
_MIN_LAG = 1e-3


@dataclass(frozen=True)
class Remembered:
    """One sample as a run's state knows it.

    Attributes:
        line: its line in ``samples.jsonl``, from 0.
        kind: of what it is: ``wrong`` and ``right`` answers' feedback, by the expert's score, or
            ``other``.
        lag: the weighted sum of its losses when the student last learned from it.
        fresh: whether the student has not learned from it yet.
    """

    line: int
    kind: str
    lag: float = 1.0
    fresh: bool = False


@dataclass(frozen=True)
class Replay:
    """What is remembered of a run so far.

    Attributes:
        lines: lines of ``samples.jsonl`` so far.
        kept: what is remembered, the oldest first.
    """

    lines: int = 0
    kept: tuple[Remembered, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain lists; floats survive JSON bit for bit."""
        return {
            "lines": self.lines,
            "kept": [[one.line, one.kind, one.lag, one.fresh] for one in self.kept],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Replay:
        """What :meth:`to_json` gave, also after a trip through JSON text."""
        return cls(value["lines"], tuple(Remembered(*one) for one in value["kept"]))

    def added(self, samples: Sequence[Sample], *, fresh: bool) -> Replay:
        """With some more samples at the log's end."""
        more = tuple(
            Remembered(line, _kind(sample), fresh=fresh)
            for line, sample in enumerate(samples, self.lines)
        )
        return Replay(self.lines + len(more), (*self.kept, *more))

    def fresh(self) -> tuple[int, ...]:
        """The lines that the student has not learned from yet."""
        return tuple(one.line for one in self.kept if one.fresh)

    def learned(self, lags: Mapping[int, float], most: int) -> Replay:
        """After an update: nothing is fresh any more, and only the newest are kept.

        Args:
            lags: the lag of each line that was learned from; one that is not finite is forgotten,
                since it voids every update that it is in.
            most: how many to keep.
        """
        kept = [replace(one, lag=lags.get(one.line, one.lag), fresh=False) for one in self.kept]
        kept = [one for one in kept if math.isfinite(one.lag)]
        return replace(self, kept=tuple(kept[len(kept) - min(most, len(kept)) :]))


def _kind(sample: Sample) -> str:
    if sample.expert_score is None:
        return "other"
    return "right" if sample.expert_score > 0 else "wrong"


@dataclass
class Memory:
    """The samples that are remembered, by their lines; read again where they are not here.

    Attributes:
        read: gives the samples of some lines of ``samples.jsonl``.
        samples: those in memory.
    """

    read: Callable[[Sequence[int]], Sequence[Sample]]
    samples: dict[int, Sample] = field(default_factory=dict)

    def of(self, lines: Sequence[int]) -> list[Sample]:
        """The samples of some lines."""
        missing = [line for line in lines if line not in self.samples]
        if missing:
            self.samples.update(zip(missing, self.read(missing), strict=True))
        return [self.samples[line] for line in lines]

    def keep(self, replay: Replay) -> None:
        """Let go of what is not remembered."""
        kept = {one.line for one in replay.kept}
        self.samples = {line: s for line, s in self.samples.items() if line in kept}


def choose(
    replay: Replay, new: Sequence[int], options: TrainingOptions, rng: np.random.Generator
) -> list[list[int]]:
    """The lines of each of a batch's optimiser steps.

    A step has all new samples, and for each of them ``replay`` earlier ones, drawn without
    replacement. With ``step_samples`` it has that many, as far as there are any, in the same
    proportion: each new one has its turn before any has a second, and where there are few new ones
    earlier ones are in their place.

    Args:
        replay: what is remembered.
        new: lines that the student is to learn from now, at least one.
        options: how many steps, of how many samples, and how earlier ones are drawn.
        rng: of the draws.
    """
    known = set(new)
    old = [one for one in replay.kept if one.line not in known]
    size, more = len(new), min(round(len(new) * options.replay), len(old))
    if whole := options.step_samples:
        size = min(size, max(round(whole / (1 + options.replay)), 1))
        more = min(whole - size, len(old)) if options.replay else 0
        # While little is remembered a step is filled up with new ones.
        size = min(len(new), whole - more)
    odds = np.log(_odds(old, options)) if old else np.zeros(0)
    steps: list[list[int]] = []
    queue: list[int] = []
    for _ in range(options.kd_steps):
        chosen: list[int] = []
        while len(chosen) < size:
            if not queue:
                # Taken from the end: those that this step has already come last.
                drawn = rng.permutation(new).tolist()
                has = set(chosen)
                queue = [line for line in drawn if line in has]
                queue += [line for line in drawn if line not in has]
            chosen.append(queue.pop())
        # The k largest of log w + Gumbel are k drawn without replacement.
        keys = odds + rng.gumbel(size=len(old))
        chosen += [old[index].line for index in np.argsort(-keys, kind="stable")[:more]]
        steps.append(chosen)
    return steps


def _odds(old: Sequence[Remembered], options: TrainingOptions) -> Any:
    lagging = options.replay_by == "lag"
    odds = np.array([max(one.lag, _MIN_LAG) if lagging else 1.0 for one in old])
    if options.replay_balance:
        kinds = np.array([one.kind for one in old])
        wrong, right = kinds == "wrong", kinds == "right"
        # With one of them alone there is nothing to balance, and all others keep their odds.
        if wrong.any() and right.any():
            half = odds[wrong | right].sum() / 2
            for of in (wrong, right):
                odds[of] *= half / odds[of].sum()
    return odds
