"""The published methods of self-distillation, each in full: options of a run by their names.

What differs between sources, and which is taken, stands in docs/methods.md. Learning rates that
were published for whole models are ten times as large here, where LoRA is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.models.aliases import ALIASES, TINY_BASE
from mlx_fd.problems import execution

CUSTOM = "custom"
DEFAULT_MODEL = TINY_BASE

# What a run of self-distillation changes against the loop's defaults.
_DEFAULTS: dict[str, Any] = {
    "expert": "",
    "gate": "always",
    "batch_size": 32,
    "max_answer_tokens": 512,
    "max_feedback_tokens": 512,
    "kd_steps": 1,
    "weight_decay": 0.0,
    "probe_size": 32,
    "probe_every": 5,
    "exam_size": 0,
    "replay": 0.0,
    "lr_schedule": "constant",
}

# OPSD's LoRA, which its followers keep (arXiv 2601.18734).
_OPSD_LORA = {"lora_rank": 64, "lora_scale": 2.0}

METHODS: dict[str, dict[str, Any]] = {
    # TRL's defaults; eight attempts, as all comparisons below have them (arXiv 2402.03300).
    "grpo": {
        "context": "none",
        "objective": "grpo",
        "num_generations": 8,
        "batch_size": 4,
        "lora_rate": 1e-5,
    },
    # arXiv 2601.18734, as its last version and those who compare with it have it.
    "opsd-reference": {
        "context": "reference",
        "objective": "forward",
        "support": "teacher",
        "loss_top_k": 100,
        "token_clip": 0.05,
        "temperature": 1.1,
        "top_p": 0.95,
        "top_k": 20,
        "max_answer_tokens": 1024,
        "lora_rate": 2e-4,
        "max_grad_norm": 0.1,
        **_OPSD_LORA,
    },
    # arXiv 2606.11173
    "step-critique": {
        "context": "step-critique",
        "objective": "forward",
        "temperature": 1.1,
        "max_answer_tokens": 2048,
        "max_feedback_tokens": 2048,
        "lora_rate": 5e-6,
        **_OPSD_LORA,
    },
    # arXiv 2601.20802, the setting without rich feedback.
    "sdpo": {
        "context": "sibling",
        "objective": "jsd",
        "num_generations": 8,
        "self_teacher": "ema",
        "teacher_decay": 0.95,
        "support": "student",
        "loss_top_k": 100,
        "stale_cap": 2.0,
        "lora_rate": 1e-4,
        "warmup_steps": 10,
    },
    # arXiv 2601.19897; its results are of forward KL, as the first author says (issue 5 of
    # github.com/idanshen/Self-Distillation), and not of the reverse one of its equation.
    "sdft": {
        "context": "demonstration",
        "objective": "forward",
        "self_teacher": "ema",
        "teacher_decay": 0.95,
        "lora_rate": 2e-4,
    },
    # arXiv 2606.19327
    "rcsd": {
        "context": "rubric",
        "critic": "self",
        "objective": "forward",
        "support": "teacher",
        "loss_top_k": 20,
        "tail": False,
        "token_clip": 0.05,
        "temperature": 1.2,
        "top_p": 0.95,
        "top_k": 20,
        "max_answer_tokens": 4096,
        "lora_rate": 5e-6,
        **_OPSD_LORA,
    },
    # arXiv 2605.12741
    "resd": {
        "context": "reflection",
        "critic": "self",
        "objective": "reverse",
        "self_teacher": "ema",
        "teacher_decay": 0.9999,
        "support": "student",
        "loss_top_k": 100,
        "stale_cap": 2.0,
        "kd_steps": 4,
        "lora_rate": 1e-5,
    },
    # arXiv 2606.11709
    "rlcsd": {
        "context": "contrast",
        "objective": "contrastive",
        "num_generations": 8,
        "batch_size": 16,
        "top_p": 0.95,
        "top_k": 20,
        "self_teacher": "snapshot",
        "teacher_sync_steps": 10,
        "lora_rate": 1e-5,
        "warmup_steps": 50,
    },
    # arXiv 2605.23954, whose numbers are not published but for the bounds of the reward.
    "echodistill": {
        "context": "clean",
        "objective": "echo",
        "noise": "typed",
        "num_generations": 8,
        "batch_size": 4,
        "importance_sampling_level": "sequence",
        "policy_weight": 1.0,
        "lora_rate": 1e-5,
    },
}

# An expert as the teacher, on answers: `mlx-fd distil`.
EXPERT_METHODS: dict[str, dict[str, Any]] = {
    # Each token of the student's own answers, under the whole of the expert's distribution
    # (Agarwal et al., arXiv 2306.13649, with reverse KL).
    "on-policy": {"objective": "reverse", "on_policy_fraction": 1.0},
    # GKD as published for reasoning (arXiv 2306.13649), and as TRL has it.
    "gkd": {
        "objective": "jsd",
        "jsd_beta": 0.5,
        "on_policy_fraction": 0.5,
        "expert_answers": "all",
        "temperature": 0.9,
    },
    # Reverse KL of the drawn tokens as their advantage, four attempts at each problem.
    "tinker": {
        "objective": "sampled",
        "on_policy_fraction": 1.0,
        "num_generations": 4,
        "batch_size": 8,
    },
    # The expert's right answers under its own distributions (Hinton et al., arXiv 1503.02531).
    "off-policy": {"objective": "forward", "on_policy_fraction": 0.0},
    # The expert's right answers as texts (rejection sampling).
    "sft": {"objective": "likelihood", "on_policy_fraction": 0.0},
}
_EXPERT_DEFAULTS: dict[str, Any] = {
    "self_teacher": "expert",
    "context": "none",
    "lora_rate": 1e-4,
    "batch_size": 16,
    "warmup_steps": 10,
}

# The models in the package: short texts, a rate that moves them.
_TINY: dict[str, Any] = {
    "problems": "arithmetic",
    "episodes": 320,
    "batch_size": 16,
    "max_answer_tokens": 64,
    "max_feedback_tokens": 112,
    "critic_sees": "problem",
    "micro_batch": 32,
    "generation_batch_size": 128,
    "lora_rank": 16,
    # With 2 next to nothing is learned at this rate, and three times it undoes the model.
    "lora_scale": 4.0,
    "lora_rate": 1e-3,
    "warmup_steps": 0,
}
# Sizes for a kind of model, whatever the method.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-hard": {**_TINY, "problems": "arithmetic-hard"},
    # A look, in minutes, at a model of the size of SmolLM2.
    "quick": {
        "episodes": 8,
        "batch_size": 2,
        "max_answer_tokens": 96,
        "max_feedback_tokens": 64,
        "probe_size": 4,
        "probe_every": 2,
        "checkpoint_every": 1,
        "lora_rank": 8,
        "lora_rate": 1e-4,
        "warmup_steps": 0,
    },
}


def configured(
    method: str = CUSTOM,
    given: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    over: Config | None = None,
) -> Config:
    """The configuration of a run.

    Args:
        method: one of :data:`METHODS`, or ``"custom"``.
        given: options that win over the method's and the preset's.
        preset: one of :data:`PRESETS`; ``None``: the model's own, if it has one.
        over: an earlier run's configuration, which is all that ``given`` is over.

    Raises:
        UserError: an unknown method, preset or option, or a value that will not do.
    """
    given = dict(given or {})
    if given.get("allow_code_execution"):
        # Said here and now; what a file says of it allows nothing.
        execution.allow()
    if over is not None:
        return override(over, given, "command line")
    if method in EXPERT_METHODS:
        return _with_expert(method, given, preset)
    model = given.get("student") or DEFAULT_MODEL
    preset = preset or _own_preset(model)
    for kind, name, table in (("method", method, METHODS), ("preset", preset, PRESETS)):
        if name and name != CUSTOM and name not in table:
            raise UserError(f"there is no {kind} {name!r} (there are: {', '.join(table)})")
    config = override(Config(), {**_DEFAULTS, "student": model, "method": method}, "defaults")
    config = override(config, METHODS.get(method, {}), f"method {method}")
    config = override(config, PRESETS.get(preset or "", {}), f"preset {preset}")
    return override(config, given, "command line")


def _own_preset(model: str) -> str | None:
    return ALIASES[model].preset or None if model in ALIASES else None


def _with_expert(method: str, given: dict[str, Any], preset: str | None) -> Config:
    """The configuration of a run whose teacher is an expert: the critic, in its run's words."""
    expert = given.pop("expert", "") or Config().models.expert
    preset = preset or _own_preset(expert)
    if preset and preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r} (there are: {', '.join(PRESETS)})")
    names = {"expert": expert, "critic": expert, "method": method}
    config = override(Config(), {**_DEFAULTS, **_EXPERT_DEFAULTS, **names}, "defaults")
    config = override(config, EXPERT_METHODS[method], f"method {method}")
    sizes = {k: v for k, v in PRESETS.get(preset or "", {}).items() if k != "critic_sees"}
    config = override(config, sizes, f"preset {preset}")
    return override(config, given, "command line")
