"""The bare models: what they answer, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.evaluation.baselines import BASE, STUDENT, register_system
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, System, Trial, trial

if TYPE_CHECKING:
    from mlx_fd.feedback.asking import OnTokens
    from mlx_fd.feedback.stages import Answered


def as_answered(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """The answers as they are."""
    return [trial(setting, one.answer, one.usage, {}) for one in answered]


register_system(
    System(
        name="expert",
        help="the expert's own answers",
        order=60,
        label="Expert alone",
        begins_with="expert",
        amateur=None,
        run=as_answered,
    )
)
register_system(
    System(
        name=STUDENT,
        help="the trained student's own answers",
        order=70,
        label="Student alone",
        begins_with="student",
        amateur=None,
        run=as_answered,
        is_baseline=False,
    )
)
register_system(
    System(
        name=BASE,
        help="the answers of the model that the student was before",
        order=80,
        label="Base model alone",
        begins_with="untrained",
        amateur=None,
        run=as_answered,
        is_baseline=False,
    )
)
