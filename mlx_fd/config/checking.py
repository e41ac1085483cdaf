"""A configuration with some options changed, and checked: do they go together?"""

from __future__ import annotations

import dataclasses
import datetime
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.config.options import OPTIONS, Config
from mlx_fd.config.values import checked, suggest
from mlx_fd.errors import UserError
from mlx_fd.text import shown

# Trust takes 58,000 verdicts there.
_MIN_DISAGREEMENT = 1e-4
_WARM_UP = re.compile(r"([a-z][a-z-]*):([1-9][0-9]{0,8})")


def override(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """A configuration with some options changed.

    Args:
        config: what to start from.
        changes: option name to value.
        where: named in errors: a file, a preset, or the command line.

    Returns:
        The new configuration, checked.

    Raises:
        UserError: an unknown option (with a suggestion), a wrong type, a value out of range, or
            options that contradict each other.
    """
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in OPTIONS:
            raise UserError(
                f"{where}: there is no option {shown(name)}{suggest(name, list(OPTIONS))}"
            )
        option = OPTIONS[name]
        by_section.setdefault(option.section, {})[name] = checked(option, value, where)
    config = dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values)
            for section, values in by_section.items()
        },
    )
    for why in _contradictions(config):
        raise UserError(f"{where}: {why}")
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """Why options do not go together, each in one sentence."""
    models, generation, gate = config.models, config.generation, config.gate
    if generation.sequential and generation.batching == CONTINUOUS:
        yield (
            "sequential takes one problem at a time, and batching = continuous several: leave one "
            "of the two out."
        )
    if generation.places and generation.batching == "lockstep":
        yield (
            "places is for batching = continuous; in lockstep it is batch_size that says how many "
            "texts are written side by side."
        )
    if models.train == "full" and (models.lora_keys or models.lora_dropout):
        yield (
            "lora_keys and lora_dropout are of LoRA and DoRA; leave them out, or set train to lora "
            "or dora."
        )
    if models.template_date and not _is_date(models.template_date):
        yield f"template_date must be a day such as 2026-11-28, not {shown(models.template_date)}."
    if (warm_up := config.episode.warm_up) and not _WARM_UP.fullmatch(warm_up):
        yield (
            "warm_up must be a method and a number of problems, such as distil:200, not "
            f"{shown(warm_up)}."
        )
    if warm_up and config.self_distils:
        yield "warm_up is for mlx-fd loop; leave it out here."
    yield from _contradictions_of_losses(config)
    low, high = generation.answer_temperature, generation.max_answer_temperature
    if 0 < high < low:
        yield (
            f"max_answer_temperature is {high:g}, below answer_temperature, {low:g}, so that it "
            "never rises; set it to 0 if that is meant."
        )
    if 0 < gate.max_disagreement < _MIN_DISAGREEMENT:
        yield (
            f"max_disagreement is {gate.max_disagreement:g}, which takes more verdicts than a run "
            f"has; give at least {_MIN_DISAGREEMENT:g}, or 0, and the expert is always asked."
        )
    if gate.phase_begin > gate.phase_end:
        yield f"phase_begin is {gate.phase_begin:g}, after phase_end, {gate.phase_end:g}."
    names, scales = config.losses.losses, config.losses.scales
    if scales and len(scales) != len(names):
        yield (
            f"scales has {len(scales)} numbers for {len(names)} losses ({', '.join(names)}); give "
            "one for each, or none."
        )


def _contradictions_of_losses(config: Config) -> Iterator[str]:
    """Those about what is learned from."""
    losses, generation, method = config.losses, config.generation, config.selfdistill
    if losses.student_context != "none" and generation.answers_by != "student":
        yield (
            "student_context is about the student's own answers; set answers_by to student, or "
            "student_context to none."
        )
    thinking = generation.expert_thinking, generation.student_thinking
    if losses.distil_thoughts and (thinking != ("on", "on") or config.models.score_at == "prompt"):
        yield (
            "distil_thoughts needs both models to think and a score head that reads behind the "
            "thought: set expert_thinking and student_thinking to on and score_at to own or "
            "feedback, or leave distil_thoughts off."
        )
    if losses.expert_verdicts == "privileged" and generation.expert_thinking == "on":
        yield (
            "expert_verdicts = privileged would put the right answer into thoughts that the "
            "student reads; set expert_thinking to off, or expert_verdicts to checked."
        )
    if losses.expert_verdicts == "privileged" and losses.needs_attention:
        yield (
            "the attention loss compares what both models attend to in one prompt, and "
            "expert_verdicts = privileged gives the expert another one; leave attention out of "
            "losses, or set expert_verdicts to checked."
        )
    if losses.teacher_top_k and losses.standardize_logits:
        yield "standardize_logits needs whole distributions; set teacher_top_k to 0."
    of_experts = losses.losses == ("lm",) and losses.student_context == "none"
    if of_experts and losses.on_policy_fraction == 1 and not losses.learns_solutions:
        yield (
            "the lm loss learns from the expert's texts alone, and with on_policy_fraction = 1 and "
            "without solutions there are none; set on_policy_fraction below 1, or add a loss."
        )
    keeps_answers = method.self_teacher == "expert" and method.support == "teacher"
    if losses.teacher_cache and not (losses.teacher_top_k or keeps_answers):
        needed = "teacher_top_k only; set that (16, for instance)"
        if config.self_distils:
            needed = "an expert's likeliest tokens only; set support to teacher"
        yield f"teacher_cache is used with {needed}, or leave teacher_cache empty."
    if method.objective == "likelihood" and losses.on_policy_fraction == 1:
        yield (
            "objective = likelihood learns from the expert's answers alone, and with "
            "on_policy_fraction = 1 there are none; set on_policy_fraction to 0."
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def check_command(config: Config, command: str, file: Path | None) -> None:
    """Make sure that a configuration is of the command that it is given to.

    Args:
        config: as it was read.
        command: ``loop``, ``distil`` or ``self-distill``.
        file: where it was read.

    Raises:
        UserError: it is another command's.
    """
    if config.command != command:
        own = f"mlx-fd {config.command}"
        raise UserError(
            f"{file} is of a run of {own}, and not of mlx-fd {command}: {own} --config "
            f"{shlex.quote(str(file))}"
        )
