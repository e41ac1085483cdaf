"""What an export says of its student's score head (:mod:`mlx_fd.models.score_head`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlx_fd.models.score_head import ScoreHead
from mlx_fd.models.student import HEADS, read_arrays
from mlx_fd.problems.kinds import KINDS
from mlx_fd.problems.prompts import FEEDBACK_OPENING, answer_prompt, feedback_prompt

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import ModelRef
    from mlx_fd.models.loading import Loaded

_PROBLEM, _ANSWER = "\u241fproblem\u241f", "\u241fanswer\u241f"


def score_head(ref: ModelRef, live: Loaded) -> ScoreHead | None:
    """The score head of what is exported; ``None`` where none was trained.

    Args:
        ref: what is exported.
        live: its language model, with the template that it was trained with.
    """
    if not ref.scores or ref.config is None or ref.checkpoint is None:
        return None
    import mlx.core as mx

    heads = read_arrays(ref.checkpoint / HEADS)
    weight, bias = (
        np.array(heads[f"score_head.{part}"].astype(mx.float32)) for part in ("weight", "bias")
    )
    about = {
        "score_at": ref.config.models.score_at,
        "max_tokens": str(ref.config.generation.max_feedback_tokens),
        **_around(ref, live),
    }
    if ref.repetition_penalty != 1:
        about["repetition_penalty"] = str(ref.repetition_penalty)
    return ScoreHead(weight, bias, about)


def _around(ref: ModelRef, live: Loaded) -> dict[str, str]:
    """The prompt's text around problem and answer; nothing where three texts do not make it."""
    from mlx_fd.models.generation import chat_text

    if ref.thinking.on:  # what it thinks comes between
        return {}
    problem = answer_prompt(_PROBLEM, KINDS[ref.answer_kind].form)
    text = chat_text(live, [problem, _ANSWER, feedback_prompt()]) + FEEDBACK_OPENING
    before, _, rest = text.partition(_PROBLEM)
    between, _, after = rest.partition(_ANSWER)
    if not after or any(mark in before + between + after for mark in (_PROBLEM, _ANSWER)):
        return {}
    return {"before": before, "between": between, "after": after}
