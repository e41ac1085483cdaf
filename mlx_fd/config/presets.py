"""Configurations by name."""

from __future__ import annotations

from typing import Any

from mlx_fd.config.checking import override
from mlx_fd.config.options import Config
from mlx_fd.config.values import suggest
from mlx_fd.errors import UserError

# The embedded pair: minutes on a CPU, and the truth of every answer is known (docs/log.md).
# It differs from the defaults in sizes and rates only.
_TINY: dict[str, Any] = {
    "expert": "tiny",
    "problems": "arithmetic",
    "episodes": 1600,
    "batch_size": 64,
    "max_answer_tokens": 64,
    "max_feedback_tokens": 112,
    "max_merge_tokens": 112,
    "kd_steps": 16,
    "step_samples": 32,
    "replay_size": 2048,
    "micro_batch": 8,
    "lora_rank": 64,
    "lora_rate": 3e-3,
    "score_rate": 3e-3,
    "projection_rate": 1e-3,
    "own_solutions": 3,
    "probe_size": 32,
    "ema_decay": 0.7,
    "exam_size": 200,
}
# What each preset changes against the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "episodes": 8,
        "batch_size": 4,
        "max_answer_tokens": 128,
        "max_feedback_tokens": 64,
        "max_merge_tokens": 48,
        "probe_size": 4,
        "checkpoint_every": 1,
        "lora_rank": 8,
        "lora_rate": 5e-4,
    },
    "tiny": _TINY,
    # The embedded pair whose expert is often wrong at first.
    "tiny-hard": {**_TINY, "expert": "tiny-hard", "problems": "arithmetic-hard"},
    # The hyperparameters of the published code (docs/methods.md), with its gate.
    "published": {
        "gate": "published",
        "answers_by": "expert",
        "answer_temperature": 0.0,
        "score_at": "prompt",
        "solutions": False,
        "replay": 0.0,
        "lr_schedule": "constant",
        # 5e-7 there, for all weights; LoRA starts from nothing and learns nothing at that rate.
        "lora_rate": 1e-4,
        "score_rate": 5e-5,
        "projection_rate": 1e-6,
        "weight_decay": 0.01,
        "kl": "forward",
        "loss_temperature": 4.0,
        "standardize_logits": True,
        "scales": (1.0, 1.0, 1.0, 0.03),
        "batch_size": 3,
        "micro_batch": 3,
        "kd_steps": 2,
        "max_answer_tokens": 500,
        "max_feedback_tokens": 200,
        "expert_repetition_penalty": 1.2,
        "student_repetition_penalty": 1.05,
        "student_weight": 0.65,
        "target_score": 1.0,
        "episodes": 200,
    },
    "overnight": {"episodes": 2000, "probe_size": 16, "probe_every": 2, "checkpoint_every": 8},
    "16gb": {
        "batch_size": 2,
        "micro_batch": 1,
        "max_answer_tokens": 256,
        "max_feedback_tokens": 128,
        "max_merge_tokens": 96,
        "lora_rank": 8,
        "grad_checkpoint": True,
    },
}


def preset(name: str, config: Config | None = None) -> Config:
    """The preset ``name`` over ``config``.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(
            f"there is no preset {name!r}{suggest(name, list(PRESETS))} "
            f"(there are: {', '.join(PRESETS)})"
        )
    return override(config or Config(), PRESETS[name], f"preset {name}")
