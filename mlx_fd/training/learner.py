"""What a run's batches work with: models, optimiser, memory, and whom they report to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.optimizers as optim

from mlx_fd.config import Config
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.feedback.asking import Group, OnTokens, Seeds, ask_in_step, derive_seed
from mlx_fd.feedback.continuous import ask_continuously
from mlx_fd.feedback.distill import measure_each
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.models import ranks
from mlx_fd.runs.events import Event, Step
from mlx_fd.training.probe import Probe
from mlx_fd.training.replay import Memory

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


def seeds_of(number: int, learner: Learner) -> Seeds:
    """The seeds of a batch's draws."""
    seed = learner.config.episode.seed
    return lambda step: derive_seed(seed, number, ranks.step_name(step))
