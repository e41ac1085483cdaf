"""The bare models: what they answer, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.evaluation.baselines.trials import Seeds, Setting, Trial, trial
from mlx_fd.feedback.episode import Draft, Progress


def as_answered(
    setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    """The answers as they are."""
    return [trial(setting, draft, {}) for draft in drafts]
