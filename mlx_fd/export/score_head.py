"""What an export says of its student's score head (:mod:`mlx_fd.models.score_head`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from mlx_fd.feedback.exported import prompt_around
from mlx_fd.models.score_head import ScoreHead
from mlx_fd.models.student import HEADS, read_arrays
from mlx_fd.models.template_sandbox import CLOCK
from mlx_fd.problems.kinds import KINDS

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import ModelRef
    from mlx_fd.models.loading import Loaded


def score_head(ref: ModelRef, live: Loaded) -> ScoreHead | None:
    """The score head of what is exported, or exported again; ``None`` where none was trained.

    Args:
        ref: what is exported.
        live: its language model, with the template that it was trained with.
    """
    if ref.head is not None:
        return ref.head
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
        # What it thinks comes between.
        **({} if ref.thinking.on else prompt_around(live, KINDS[ref.answer_kind].form)),
    }
    if CLOCK in live.template.source:
        about["date"] = live.template.date
    if ref.template is not None and ref.template.kwargs:
        about["template_kwargs"] = json.dumps(ref.template.kwargs)
    if ref.repetition_penalty != 1:
        about["repetition_penalty"] = str(ref.repetition_penalty)
    return ScoreHead(weight, bias, about)
