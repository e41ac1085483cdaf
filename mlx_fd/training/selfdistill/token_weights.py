"""What each token counts in an update, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_fd.config import Method
from mlx_fd.training.selfdistill import objectives
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats


@dataclass(frozen=True)
class TokenWeights:
    """What each token of some texts counts in the loss; the parts of it that numbers alone give.

    Attributes:
        matches: for each text [T], the factor of each token's divergence.
        pushes: for each text [T], the derivative of the rest of the loss by each log-probability.
        losses: the loss on sampled tokens and the policy's, where there are such, by name.
        clipped: share of tokens whose ratio is cut.
        rewards: of each text, after shaping.
        group_advantages: of each text; empty where the loss has none.
    """

    matches: list[mx.array]
    pushes: list[mx.array]
    losses: dict[str, float]
    clipped: float
    rewards: list[float]
    group_advantages: list[float]

    def teaches(self) -> list[bool]:
        """Whether anything of a text counts."""
        some = [
            mx.any(match != 0) | mx.any(push != 0)
            for match, push in zip(self.matches, self.pushes, strict=True)
        ]
        counts: Any = mx.stack(some).tolist()
        return list(counts)


def token_weights(
    stats: Sequence[RolloutStats],
    options: Method,
    max_tokens: int,
    near: Mapping[int, float] | None = None,
) -> TokenWeights:
    """What each token counts, from numbers alone.

    Args:
        stats: of all texts of the update.
        options: the objective, its weights and bounds.
        max_tokens: the most tokens of an attempt, by which Dr. GRPO divides.
        near: for EchoDistill, by group the student's divergence from the clean teacher.
    """
    lengths = [len(item.text.target) for item in stats]
    mask = mx.array([[t < n for t in range(max(lengths))] for n in lengths])
    width = mask.shape[1]
    now = _padded([item.now for item in stats], width)
    old = _padded([item.old for item in stats], width)
    teaches = mx.array([item.teacher is not None for item in stats])
    if options.objective == "likelihood":
        teaches = mx.array([item.likely for item in stats])
    taught = mask & teaches[:, None] & (mx.arange(width) >= options.skip_tokens)
    if options.first_tokens:
        taught = taught & (mx.arange(width) < options.first_tokens)
    stale = objectives.truncated_ratio(now, old, options.stale_cap or math.inf)
    share = stale * taught / mx.maximum(taught.sum(), 1)
    rewards, losses = [item.reward for item in stats], {}
    matches = mx.zeros(mask.shape)
    pushes = mx.zeros(mask.shape)
    if options.objective in objectives.DIVERGENCES:
        matches = options.match_weight * share
    elif options.objective == "sampled":
        teacher = _padded([item.teacher for item in stats], width)
        sampled, grad = mx.value_and_grad(objectives.sampled_loss)(now, teacher, share, taught)
        losses["sampled"] = float(sampled)
        pushes = options.match_weight * grad
    elif options.objective == "likelihood":
        losses["likelihood"] = -float((share * now).sum())
        pushes = -options.match_weight * share
    clipped, advantages = 0.0, list[float]()
    if options.objective in objectives.POLICIES or options.policy_weight:
        if options.objective == "echo" and near is not None:
            rewards = _shaped(stats, near, options)
        advantages = _group_advantages(stats, rewards, options)
        losses["policy"], grad, clipped = _policy(
            stats, now, old, mask, advantages, options, max_tokens
        )
        pushes = pushes + policy_share(options) * grad
    mx.eval(matches, pushes)
    return TokenWeights(
        matches=[row[:n] for row, n in zip(matches, lengths, strict=True)],
        pushes=[row[:n] for row, n in zip(pushes, lengths, strict=True)],
        losses=losses,
        clipped=clipped,
        rewards=rewards,
        group_advantages=advantages,
    )


def _padded(rows: Sequence[mx.array | None], width: int) -> mx.array:
    """[B, width] of rows [T]; 0 where there is nothing."""
    return mx.stack(
        [mx.zeros(width) if row is None else mx.pad(row, (0, width - len(row))) for row in rows]
    )


def _by_group(stats: Sequence[RolloutStats]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(stats):
        groups.setdefault(item.group, []).append(index)
    return list(groups.values())


def _shaped(
    stats: Sequence[RolloutStats], near: Mapping[int, float], options: Method
) -> list[float]:
    rewards = mx.array([item.reward for item in stats])[:, None]
    divergences = mx.array([near[item.group] for item in stats])
    shaped: Any = objectives.shaped_rewards(rewards, divergences, options.near_bonus).tolist()
    return [value for (value,) in shaped]


def _group_advantages(
    stats: Sequence[RolloutStats], rewards: Sequence[float], options: Method
) -> list[float]:
    groups = _by_group(stats)
    table = mx.array([[rewards[index] for index in group] for group in groups])
    values: Any = objectives.group_advantages(
        table, options.scale_rewards, options.reward_baseline
    ).tolist()
    advantages = dict[int, float]()
    for group, row in zip(groups, values, strict=True):
        advantages.update(zip(group, row, strict=True))
    return [advantages[index] for index in range(len(stats))]


def _policy(
    stats: Sequence[RolloutStats],
    now: mx.array,
    old: mx.array,
    mask: mx.array,
    advantages: Sequence[float],
    options: Method,
    max_tokens: int,
) -> tuple[float, mx.array, float]:
    """A policy's loss, its derivative by each log-probability, and the share of cut ratios."""
    if options.mask_truncated_completions:
        mask = mask & mx.array([item.finished for item in stats])[:, None]
    moved = mx.array(list(advantages))
    weights = objectives.aggregation_weights(mask, options.loss_type, max_tokens)
    if options.objective == "contrastive":
        # As the published code has it: without hints of both kinds an attempt is left out.
        mask = mask & mx.array([item.wrong is not None for item in stats])[:, None]
        moved, selected = objectives.modulated(
            moved,
            _contrasts(stats, mask),
            tau=options.contrast_tau,
            scale=options.contrast_scale,
            clip=options.contrast_clip,
            gate=options.contrast_gate,
        )
        weights = objectives.contrastive_weights(selected, mask, options.contrast_weight)
    if options.objective == "echo":
        # Its ratio is against the clean teacher, which reads something else than the student did.
        before = [item.old if item.teacher is None else item.teacher for item in stats]
        old = _padded(before, mask.shape[1])
    reference = None
    if options.kl_coef:
        reference = _padded([item.reference for item in stats], mask.shape[1])
    clipping = objectives.Clipping(
        low=options.epsilon,
        high=options.epsilon_high,
        cap=options.delta or math.inf,
        level=options.importance_sampling_level,
    )

    def loss(now: mx.array) -> tuple[mx.array, mx.array]:
        return objectives.policy_loss(
            now,
            old,
            moved,
            weights,
            mask,
            clipping,
            reference=reference,
            kl_weight=options.kl_coef,
        )

    (value, clipped), grad = mx.value_and_grad(loss)(now)
    return float(value), grad, float(clipped)


def _contrasts(stats: Sequence[RolloutStats], mask: mx.array) -> mx.array:
    width = mask.shape[1]
    most = max([1, *(len(item.wrong) for item in stats if item.wrong is not None)])
    wrong = []
    for item in stats:
        rows = mx.zeros((0, 0)) if item.wrong is None else item.wrong
        wrong.append(mx.pad(rows, [(0, most - rows.shape[0]), (0, width - rows.shape[1])]))
    hints = mx.array(
        [[item.wrong is not None and k < len(item.wrong) for k in range(most)] for item in stats]
    )
    teacher = _padded([item.teacher for item in stats], width)
    return mx.where(mask, objectives.contrast(teacher, mx.stack(wrong), hints), 0)


def policy_share(options: Method) -> float:
    """The weight of a policy's loss; nothing is beside it in grpo and contrastive."""
    return 1.0 if options.objective in ("grpo", "contrastive") else options.policy_weight


def echo_weights(echoes: Sequence[RolloutStats], options: Method) -> list[mx.array]:
    """What each token of the teacher's answers counts: all the same, over all of them."""
    tokens = sum(len(item.text.target) for item in echoes)
    return [mx.full((len(item.text.target),), options.match_weight / tokens) for item in echoes]
