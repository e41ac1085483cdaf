"""The bare models: what they answer, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.evaluation.baselines.trials import Seeds, Setting, Trial, trial
from mlx_fd.feedback.episode import Answered, OnTokens


def as_answered(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """The answers as they are."""
    return [trial(setting, one.answer, one.usage, {}) for one in answered]
