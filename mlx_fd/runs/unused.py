"""Options without effect: whoever gives one is told so before it costs anything.

A configuration has a value of every option, so that a file with all of them says nothing of what
was meant. An option that was given by itself was meant. Where the others leave it nothing to do it
is refused, and what it needs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_fd.config import OPTIONS, Config
from mlx_fd.errors import UserError
from mlx_fd.problems.sources import names_with_truth, truth_of
from mlx_fd.registry import CONTEXTS

# Those of this package; another one may read any option of the losses.
_LOSSES = {"lm", "hidden", "score", "logit", "attention", "answer", "reasoning"}
_DIVERGENCES = ("forward", "reverse", "jsd")
_TOKENS = (*_DIVERGENCES, "sampled", "likelihood")
_POLICIES = ("grpo", "contrastive", "echo")
_NO_CRITIC = ("", "truth")
# Given to say that something is not wanted.
_OFF = ("", "none", "off")


@dataclass(frozen=True)
class Need:
    """What options need to have an effect.

    Attributes:
        words: the same as part of a sentence.
        is_met: whether a configuration has it.
    """

    words: str
    is_met: Callable[[Config], bool]


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _gates(*names: str) -> Need:
    return Need(f"gate = {_either(names)}", lambda config: config.gate.gate in names)


def _losses(*names: str) -> Need:
    return Need(
        f"the loss {_either(names)}",
        lambda config: any(name in names or name not in _LOSSES for name in config.losses.losses),
    )


def _objectives(*names: str) -> Need:
    return Need(
        f"objective = {_either(names)}", lambda config: config.selfdistill.objective in names
    )


def _reads(config: Config, option: str) -> bool:
    """Whether the self-teacher's context is made with an option."""
    options = config.selfdistill
    return options.objective != "grpo" and option in CONTEXTS[options.context].options


def _context(option: str) -> Need:
    readers = (name for name, context in CONTEXTS.items() if option in context.options)
    return Need(f"context = {_either(readers)}", lambda config: _reads(config, option))


def _has_critic(config: Config) -> bool:
    return _reads(config, "critic") and config.selfdistill.critic not in _NO_CRITIC


def _has_policy(config: Config) -> bool:
    options = config.selfdistill
    return options.objective in _POLICIES or options.policy_weight > 0


def _has_curve(config: Config) -> bool:
    """Whether the EMA gate watches: in the run, or afterwards in ``mlx-fd pareto``."""
    gates = ("ema",) if config.self_distils else ("ema", "always")
    return config.gate.gate in gates


def _needs() -> dict[str, Need]:
    """What each option needs that does not always have an effect."""
    lora = Need("train = lora or dora", lambda c: c.models.train != "full")
    replay = Need("replay above 0", lambda c: c.training.replay > 0)
    trust = Need(
        "gate = ema or published, and max_disagreement above 0",
        lambda c: c.gate.gate in ("ema", "published") and c.gate.max_disagreement > 0,
    )
    phases = Need(
        "loss_weights = phases or both", lambda c: c.gate.loss_weights in ("phases", "both")
    )
    policy = Need("a policy loss (objective = grpo, or policy_weight above 0)", _has_policy)
    teacher = Need("an objective with a teacher", lambda c: c.selfdistill.objective != "grpo")
    beside = Need(
        "an objective other than grpo and contrastive, which consist of the policy loss alone",
        lambda c: c.selfdistill.objective not in ("grpo", "contrastive"),
    )
    written = Need(
        "answers of the expert (on_policy_fraction below 1)",
        lambda c: c.losses.on_policy_fraction < 1 and c.selfdistill.self_teacher == "expert",
    )
    by_names: dict[tuple[str, ...], Need] = {
        ("lora_rank", "lora_scale", "lora_layers"): lora,
        ("replay_size", "replay_by", "replay_balance"): replay,
        ("max_disagreement", "audit_fraction"): _gates("ema", "published"),
        ("trigger",): Need(
            "gate = ema or published",
            # To say always twice is no mistake.
            lambda c: c.gate.gate in ("ema", "published", c.gate.trigger),
        ),
        ("own_solutions", "audit_window", "check_alone"): trust,
        ("stop_threshold",): _gates("ema"),
        ("plateau_steps", "plateau_gain", "minimum_gain", "regression"): Need(
            "gate = ema (in the loop: or always, for mlx-fd pareto)", _has_curve
        ),
        ("score_gap",): Need(
            "gate = ema and trigger = lag",
            lambda c: (c.gate.gate, c.gate.trigger) == ("ema", "lag"),
        ),
        ("ema_decay",): Need(
            "gate = ema (in the loop: or always, or loss_weights = ema or both)",
            lambda c: (
                _has_curve(c) or (not c.self_distils and c.gate.loss_weights in ("ema", "both"))
            ),
        ),
        ("phase_begin", "phase_end"): phases,
        ("kl", "loss_temperature", "standardize_logits"): _losses("logit", "reasoning"),
        ("hidden_layers",): _losses("hidden", "attention"),
        ("attention_heads",): _losses("attention"),
        ("score_rate",): _losses("score"),
        ("projection_rate",): _losses("hidden"),
        ("student_context_weight",): Need(
            "a student_context", lambda c: c.losses.student_context != "none"
        ),
        ("warm_up_rate",): Need("a warm_up", lambda c: bool(c.episode.warm_up)),
        ("exam_size",): Need(
            f"problems = {names_with_truth()}", lambda c: truth_of(c.problems.problems) is not None
        ),
        ("max_thinking_tokens",): Need(
            "expert_thinking or student_thinking = on", lambda c: c.generation.thought_tokens > 0
        ),
        # Of self-distillation.
        ("critic",): _context("critic"),
        ("max_feedback_tokens", "expert_thinking"): Need(
            "a critic that is a model, and a context that has it write",
            lambda c: c.command != "self-distill" or _has_critic(c),
        ),
        ("critic_sees",): Need(
            f"a critic that is a model, and {_context('critic_sees').words}",
            lambda c: _has_critic(c) and _reads(c, "critic_sees"),
        ),
        ("reference_style",): _context("reference_style"),
        ("wrong_hints",): _context("wrong_hints"),
        ("context", "self_teacher"): teacher,
        ("noise_level",): Need("a noise", lambda c: c.selfdistill.noise != "none"),
        ("teacher_decay",): Need(
            "self_teacher = ema", lambda c: c.selfdistill.self_teacher == "ema"
        ),
        ("teacher_sync_steps",): Need(
            "self_teacher = snapshot", lambda c: c.selfdistill.self_teacher == "snapshot"
        ),
        ("jsd_beta",): _objectives("jsd"),
        ("support",): _objectives(*_DIVERGENCES),
        ("loss_top_k", "tail"): Need(
            "support = teacher or student, and objective = forward, reverse or jsd",
            lambda c: c.selfdistill.support != "all" and c.selfdistill.objective in _DIVERGENCES,
        ),
        ("token_clip",): _objectives(*_DIVERGENCES, "echo"),
        ("stale_cap", "skip_tokens", "first_tokens"): _objectives(*_TOKENS),
        ("match_weight", "policy_weight"): beside,
        ("expert_answers",): written,
        ("reward_baseline", "epsilon", "epsilon_high", "delta", "kl_coef"): policy,
        ("importance_sampling_level", "mask_truncated_completions"): policy,
        ("scale_rewards",): Need(
            f"{policy.words}, and reward_baseline = group",
            lambda c: _has_policy(c) and c.selfdistill.reward_baseline == "group",
        ),
        ("loss_type",): Need(
            f"{policy.words} other than that of contrastive",
            lambda c: _has_policy(c) and c.selfdistill.objective != "contrastive",
        ),
        ("contrast_tau", "contrast_scale", "contrast_clip"): _objectives("contrastive"),
        ("contrast_gate", "contrast_weight"): _objectives("contrastive"),
        ("near_bonus",): _objectives("echo"),
    }
    return {name: need for names, need in by_names.items() for name in names}


def check_used(config: Config, given: Mapping[str, Any], where: str) -> None:
    """Make sure that each option that was given by itself has an effect.

    What switches something off (0, an empty text, ``none``) may be given in any case.

    Args:
        config: with what was given.
        given: option name to value.
        where: named in the error as what gave the options.

    Raises:
        UserError: an option has none; the message says what it needs.
    """
    check_used_in_any([config], given, where)


def check_used_in_any(configs: Sequence[Config], given: Mapping[str, Any], where: str) -> None:
    """:func:`check_used`, where several configurations are gone through one after the other.

    Args:
        configs: each with what was given; an option needs an effect in one of them only.
        given: option name to value.
        where: named in the error as what gave the options.

    Raises:
        UserError: an option has none; the message says what it needs.
    """
    found = _needs()
    for name, value in given.items():
        # The one switch that is on by itself is as much of a wish when it is put off.
        is_off = value in _OFF or (not value and OPTIONS[name].default is not True)
        if name in found and not is_off and not any(map(found[name].is_met, configs)):
            raise UserError(
                f"{where}: {name} has no effect without {found[name].words}; leave it out."
            )
