"""One update: the loss's gradient, and one step along it.

First everything is read that is held constant: the student's own log-probabilities, and with other
adapters the teacher's (:mod:`mlx_fd.training.selfdistill.reading`). From these numbers alone comes
what each token counts (:mod:`mlx_fd.training.selfdistill.token_weights`). Only then does the
student read once more, now for its gradient, which the engine of the losses makes without logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_map

from mlx_fd.config import Config, Method, TrainingOptions
from mlx_fd.feedback.collate import concatenate_targets, micro_batches
from mlx_fd.feedback.distill import Update, loss_scale, take_step
from mlx_fd.losses.divergence import Target, fused_linear_divergences
from mlx_fd.losses.teacher import TopK, one_hot
from mlx_fd.models import ranks
from mlx_fd.models.loading import Loaded
from mlx_fd.models.logit_transform import LogitSource
from mlx_fd.training.selfdistill import objectives
from mlx_fd.training.selfdistill.reading import final_states, read
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats
from mlx_fd.training.selfdistill.token_weights import (
    TokenWeights,
    echo_weights,
    policy_share,
    token_weights,
)

# EchoDistill's text names no direction; this is the one that keeps what the teacher may say.
_KINDS = {"echo": "forward", **{name: name for name in objectives.DIVERGENCES}}


def matches_distributions(options: Method) -> bool:
    """Whether whole distributions are matched, and not just the tokens that were drawn."""
    return options.objective in _KINDS


def total(  # noqa: PLR0913
    final: mx.array,
    head: LogitSource,
    stats: Sequence[RolloutStats],
    weights: TokenWeights,
    options: Method,
    vocab: int,
    *,
    teacher_head: LogitSource | None = None,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array]:
    """What the student minimises on some texts, and the part of it that are divergences.

    The gradient of the first is the loss's; its value is not, because the policy's part has its
    derivatives where its value would be. The second is right in value.

    Args:
        final: [N, d], the student's final hidden states where the N tokens of all texts are
            predicted.
        head: the student's output head; it does not train.
        stats: of these texts, N tokens in all.
        weights: of the same texts, in the same order.
        options: the divergence, its temperature and bounds.
        vocab: V, the tokenizer's tokens.
        teacher_head: of the teacher; ``None``: the same one.
        differentiable: whether a gradient is wanted.
    """
    temperature = options.temperature
    targets = []
    if any(item.targets is not None for item in stats):
        matches = mx.concatenate(weights.matches)
        targets.append(
            Target(
                _teacher_targets_of(stats),
                teacher_head or head,
                weights=matches / temperature**2,
                kind=_KINDS[options.objective],
                temperature=temperature,
                vocab=vocab,
                beta=options.jsd_beta,
                mask=matches != 0,
                tail=options.tail,
                clip=options.token_clip or math.inf,
            )
        )
    grads = mx.concatenate(weights.pushes)
    if not targets or bool(mx.any(grads != 0).item()):
        tokens = mx.array([token for item in stats for token in item.text.target])
        targets.append(
            Target(
                one_hot(tokens),
                None,
                weights=-grads / temperature**2,
                kind="forward",
                temperature=temperature,
                vocab=vocab,
            )
        )
    value, every = fused_linear_divergences(final, head, targets, differentiable=differentiable)
    matched = mx.array(0.0)
    if targets[0].head is not None:
        matched = (every[:, 0] * targets[0].weights).sum()
    return value, matched


def _teacher_targets_of(stats: Sequence[RolloutStats]) -> mx.array | TopK:
    """The teacher's distributions of all texts' tokens in a row; anything where it has none."""
    like = next(item.targets for item in stats if item.targets is not None)
    return concatenate_targets(
        [
            _nothing(like, len(item.text.target)) if item.targets is None else item.targets
            for item in stats
        ]
    )


def _nothing(like: mx.array | TopK, length: int) -> mx.array | TopK:
    if isinstance(like, TopK):
        k = like.indices.shape[1]
        indices = mx.broadcast_to(mx.arange(k, dtype=like.indices.dtype), (length, k))
        return TopK(mx.zeros((length, k)), indices, mx.full((length,), math.log(k)))
    return mx.zeros((length, like.shape[1]), dtype=like.dtype)


def gradients(
    student: Loaded,
    stats: Sequence[RolloutStats],
    weights: TokenWeights,
    options: Method,
    training: TrainingOptions,
    teacher_head: LogitSource | None = None,
) -> tuple[Any, float]:
    """The gradient of the loss by the student's trainable weights, and the divergences' part of it.

    Texts that nothing depends on are not read, and of several ranks each reads its own.
    """
    model, lm = student.model, student.view
    scale = loss_scale(model)
    parts = [
        (item, match, push)
        for item, match, push, teaches in zip(
            stats, weights.matches, weights.pushes, weights.teaches(), strict=True
        )
        if teaches and item.own
    ]

    def loss(indices: Sequence[int]) -> tuple[mx.array, mx.array]:
        chosen = [parts[index] for index in indices]
        some = [item for item, _, _ in chosen]
        final = final_states(lm, [item.text for item in some], recompute=training.grad_checkpoint)
        of_some = dataclasses.replace(
            weights,
            matches=[match for _, match, _ in chosen],
            pushes=[push for _, _, push in chosen],
        )
        value, matched = total(
            final, lm.head, some, of_some, options, student.vocab, teacher_head=teacher_head
        )
        return value * scale, matched

    step = nn.value_and_grad(model, loss)
    sums: Any = tree_map(mx.zeros_like, model.trainable_parameters())
    matched = 0.0
    for indices in micro_batches([item.text for item, _, _ in parts], training.micro_batch):
        (value, part), grads = step(indices)
        sums = tree_map(mx.add, sums, grads)
        mx.eval(value, part, sums)
        matched += float(part)
    sums, matched = ranks.add_gradients(sums), ranks.add({"matched": matched})["matched"]
    return tree_map(lambda gradient: gradient / scale, sums), matched


def learn(
    student: Loaded,
    optimizer: optim.Optimizer,
    stats: Sequence[RolloutStats],
    config: Config,
    near: Mapping[int, float] | None = None,
    echoes: Sequence[RolloutStats] = (),
    teacher_head: LogitSource | None = None,
) -> tuple[Update | None, TokenWeights]:
    """One optimiser step (``None``: nothing taught), and what each token counted in it.

    Args:
        student: changed in place, unless something is not finite.
        optimizer: of the LoRA weights; its learning rate is set before.
        stats: of all attempts of the batch.
        config: the method; clipping, micro-batch and checkpointing; the most tokens of an attempt.
        near: as for :func:`token_weights`.
        echoes: for EchoDistill, the teacher's own answers, which are matched in the attempts'
            stead.
        teacher_head: of the teacher, where that is another model.
    """
    model, options, training = student.model, config.selfdistill, config.training
    weights = token_weights(stats, options, config.generation.max_answer_tokens, near)
    texts = [*stats, *echoes]
    if echoes:
        weights = dataclasses.replace(
            weights,
            matches=[*weights.matches, *echo_weights(echoes, options)],
            pushes=[*weights.pushes, *(mx.zeros(len(item.text.target)) for item in echoes)],
        )
    if not any(weights.teaches()):
        return None, weights
    grads, matched = gradients(student, texts, weights, options, training, teacher_head)
    losses = dict(weights.losses)
    if matches_distributions(options):
        losses = {"match": matched / (options.match_weight or 1.0), **losses}
    value = loss_value(weights, matched, options)
    norm, skipped = take_step(model, optimizer, grads, value, training)
    read_tokens = sum(len(item.text.prompt) + len(item.text.target) - 1 for item in texts)
    update = Update(
        losses=losses,
        total=value,
        gradient_norm=norm,
        skipped=skipped,
        tokens=read_tokens,
        clipped=weights.clipped,
    )
    return update, weights


def loss_value(weights: TokenWeights, matched: float, options: Method) -> float:
    """The loss, of which :func:`total` has the gradient.

    Args:
        weights: of all texts of the update.
        matched: the second of :func:`total`, summed over all texts.
        options: what each part of the loss counts.
    """
    tokens = sum(weights.losses.get(name, 0.0) for name in ("sampled", "likelihood"))
    return (
        matched
        + options.match_weight * tokens
        + policy_share(options) * weights.losses.get("policy", 0.0)
    )


def nearness(
    student: Loaded, echoes: Sequence[RolloutStats], options: Method, size: int
) -> dict[int, float]:
    """By group, the mean divergence of student and clean teacher on the teacher's answer."""
    lm = student.view
    echoes = [item for item in echoes if item.own]
    states = read(lm, [item.text for item in echoes], size)
    divergences = {}
    for item, final in zip(echoes, states, strict=True):
        length = len(item.text.target)
        even = TokenWeights(
            matches=[mx.full((length,), 1 / length)],
            pushes=[mx.zeros(length)],
            losses={},
            clipped=0.0,
            rewards=[],
            group_advantages=[],
        )
        head, vocab = lm.head, student.vocab
        _, value = total(final, head, [item], even, options, vocab, differentiable=False)
        divergences[item.group] = float(value)
    return dict(ranks.gather(list(divergences.items())))
