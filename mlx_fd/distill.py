"""One distillation update of the student.

Both models read the same prompt and the same feedback (true teacher forcing). What the expert has
to say about it, its hidden states on the feedback's positions, is computed once per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_fd import roles
from mlx_fd.config import LossOptions, TrainingOptions
from mlx_fd.episode import Draft, Outcome, Pair
from mlx_fd.generation import Conversation, opening, rewind, run_on
from mlx_fd.losses import mean
from mlx_fd.losses.hidden import aligned_layers, hidden_alignment_loss, pool
from mlx_fd.losses.language_model import language_model_loss
from mlx_fd.losses.logit import logit_loss
from mlx_fd.losses.score import score_loss
from mlx_fd.models import taps
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student, part_of

_FLOAT16_SCALE = 1024.0
Sums = dict[str, tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Sample:
    """One feedback to learn from.

    Attributes:
        prompt: tokens of the conversation up to where the feedback begins.
        target: the T tokens of the feedback.
        expert_final: [T, d_expert], the expert's final hidden states where it predicts ``target``.
        expert_pooled: for each aligned student layer, the expert's mean hidden state [d_expert].
        expert_score: in [-1, 1]; ``None`` where it could not be read, and then no loss sees it.
        on_policy: whether ``target`` is the student's own feedback; the language-model loss then
            leaves it out.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    expert_final: mx.array
    expert_pooled: tuple[mx.array, ...]
    expert_score: float | None
    on_policy: bool = False


@dataclass(frozen=True)
class Update:
    """What one optimiser step did.

    Attributes:
        losses: the mean losses before the step.
        total: the weighted sum that was minimised.
        gradient_norm: before clipping.
        skipped: the loss or its gradient was not finite, and nothing was changed.
        tokens: what the student read, padding aside.
    """

    losses: dict[str, float]
    total: float
    gradient_norm: float
    skipped: bool
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right to S tokens and T feedback positions."""

    tokens: mx.array  # [B, S]
    positions: mx.array  # [B, T]: where each feedback token is predicted
    targets: mx.array  # [B, T]
    mask: mx.array  # [B, T], float32
    expert_final: mx.array  # [B, T, d_expert]
    expert_pooled: list[mx.array]  # of [B, d_expert]
    scores: mx.array  # [B]
    score_mask: mx.array  # [B], float32
    lm_mask: mx.array  # [B, T], float32


def make_sample(
    expert: Loaded,
    student_layers: int,
    before: Conversation,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    expert_score: float | None,
    options: LossOptions,
    *,
    on_policy: bool = False,
) -> Sample:
    """Let the expert read a feedback.

    Args:
        expert: the expert.
        student_layers: blocks of the student.
        before: a conversation that ``prompt`` begins with, without its last token at least.
        prompt: all tokens before the feedback.
        target: tokens of the feedback, at least one.
        expert_score: the score the expert gave, if one could be read.
        options: which layers are aligned.
        on_policy: whether the student wrote ``target``.
    """
    rest = prompt[len(before.tokens) :]
    read = run_on(expert, before, [*rest, *target[:-1]])
    first = len(rest) - 1  # where the target's first token is predicted
    seen = taps.Forward([layer[:, first:] for layer in read.layers], read.final[:, first:])
    mask = mx.ones((1, len(target)))
    wanted = _expert_layers(student_layers, len(seen.layers), options)
    pooled = tuple(pool(seen.layers[index], mask)[0] for index in wanted)
    final = seen.final[0]
    mx.eval(final, pooled)
    return Sample(prompt, target, final, pooled, expert_score, on_policy)


def sample_of(pair: Pair, draft: Draft, options: LossOptions, *, on_policy: bool = False) -> Sample:
    """What the student can learn from a problem that the expert gave feedback on.

    Args:
        pair: the models.
        draft: after step 2 of the episode.
        options: which layers are aligned.
        on_policy: learn from the student's own feedback, read by the expert.
    """
    assert draft.expert_feedback is not None and draft.after_feedback is not None
    feedback = draft.student_feedback if on_policy else draft.expert_feedback
    return make_sample(
        pair.expert,
        len(pair.student.model.layers),
        rewind(draft.after_feedback, len(draft.prompt) - 1),
        draft.prompt,
        feedback.tokens,
        draft.expert_feedback.score,
        options,
        on_policy=on_policy,
    )


def solution_of(pair: Pair, outcome: Outcome, options: LossOptions) -> Sample:
    """What the student can learn of solving from an episode's final answer.

    Args:
        pair: the models.
        outcome: of the episode.
        options: which layers are aligned.
    """
    question = outcome.draft.problem.question
    prompt = opening(pair.expert.tokenizer, roles.answer_prompt(question))
    return make_sample(
        pair.expert,
        len(pair.student.model.layers),
        Conversation(),
        prompt,
        outcome.final.tokens,
        None,
        options,
    )


def _expert_layers(student_blocks: int, expert_states: int, options: LossOptions) -> list[int]:
    if options.hidden_layers == "last":
        return [expert_states - 1]
    return aligned_layers(student_blocks + 1, expert_states)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one padded batch."""
    length = max(len(s.target) for s in samples)
    width = max(len(s.prompt) + len(s.target) for s in samples) - 1

    def padded(rows: Sequence[Sequence[int]], to: int) -> mx.array:
        return mx.array([[*row, *[0] * (to - len(row))] for row in rows])

    mask = mx.array([[float(t < len(s.target)) for t in range(length)] for s in samples])
    off_policy = mx.array([[float(not s.on_policy)] for s in samples])
    return Batch(
        tokens=padded([(*s.prompt, *s.target[:-1]) for s in samples], width),
        positions=padded(
            [range(len(s.prompt) - 1, len(s.prompt) - 1 + len(s.target)) for s in samples], length
        ),
        targets=padded([s.target for s in samples], length),
        mask=mask,
        expert_final=mx.stack(
            [mx.pad(s.expert_final, [(0, length - len(s.target)), (0, 0)]) for s in samples]
        ),
        expert_pooled=[
            mx.stack(list(layer)) for layer in zip(*(s.expert_pooled for s in samples), strict=True)
        ],
        scores=mx.array([s.expert_score or 0.0 for s in samples]),
        score_mask=mx.array([float(s.expert_score is not None) for s in samples]),
        lm_mask=mask * off_policy,
    )


def counts(samples: Sequence[Sample], options: LossOptions) -> dict[str, float]:
    """What each loss of an update is divided by: its valid tokens or samples."""
    tokens = float(sum(len(s.target) for s in samples))
    own = float(sum(len(s.target) for s in samples if s.on_policy))
    scored = float(sum(s.expert_score is not None for s in samples))
    every = {"lm": tokens - own, "hidden": float(len(samples)), "score": scored, "logit": tokens}
    return {name: every[name] for name in options.losses}


def loss_sums(
    student: Student,
    expert: Loaded,
    batch: Batch,
    options: LossOptions,
    vocab: int,
    *,
    recompute: bool = False,
) -> Sums:
    """Each enabled loss on a batch, as (sum, count).

    Args:
        student: the student.
        expert: its head turns the kept hidden states into the expert's logits.
        batch: B samples of at most T feedback tokens.
        options: which losses, and how.
        vocab: tokens the two models share.
        recompute: gradient checkpointing.
    """
    seen = taps.forward(student.model, batch.tokens, recompute=recompute)

    def at_feedback(hidden: mx.array) -> mx.array:
        return mx.take_along_axis(hidden, batch.positions[..., None], axis=1)

    final = at_feedback(seen.final)
    sums: Sums = {}
    if "lm" in options.losses or "logit" in options.losses:
        logits = taps.head(student.model, final)
    for name in options.losses:
        if name == "lm":
            sums[name] = language_model_loss(logits, batch.targets, batch.lm_mask)
        elif name == "hidden":
            layers = seen.layers[-1:] if options.hidden_layers == "last" else seen.layers
            sums[name] = hidden_alignment_loss(
                [at_feedback(layer) for layer in layers],
                batch.expert_pooled,
                batch.mask,
                student.projection,
            )
        elif name == "score":
            sums[name] = score_loss(
                student.score(_scored(student, final, batch)), batch.scores, batch.score_mask
            )
        else:
            sums[name] = logit_loss(
                logits,
                taps.head(expert.model, batch.expert_final),
                batch.mask,
                kl=options.kl,
                temperature=options.loss_temperature,
                vocab=vocab,
                standardize=options.standardize_logits,
            )
    return sums


def _scored(student: Student, final: mx.array, batch: Batch) -> mx.array:
    """The final hidden states [B, d] that the score head reads."""
    if student.score_at == "prompt":
        return final[:, 0]
    last = batch.mask.sum(axis=1).astype(mx.int32) - 1
    return mx.take_along_axis(final, last[:, None, None], axis=1).squeeze(1)


def measure(
    student: Student,
    expert: Loaded,
    samples: Sequence[Sample],
    options: LossOptions,
    vocab: int,
    micro_batch: int,
) -> dict[str, float]:
    """The mean losses on some samples, without learning; a loss nothing is known of is left out."""
    totals: dict[str, tuple[float, float]] = dict.fromkeys(options.losses, (0.0, 0.0))
    for chunk in _chunks(samples, micro_batch):
        sums = loss_sums(student, expert, collate(chunk), options, vocab)
        mx.eval(sums)
        for name, (value, count) in sums.items():
            so_far = totals[name]
            totals[name] = (so_far[0] + float(value), so_far[1] + float(count))
    return {name: value / count for name, (value, count) in totals.items() if count}


def make_optimizer(student: Student, options: TrainingOptions) -> optim.MultiOptimizer:
    """AdamW with a learning rate for each part: score head, projection, the student's weights."""

    def adamw(rate: float) -> optim.AdamW:
        return optim.AdamW(rate, weight_decay=options.weight_decay, bias_correction=True)

    optimizer = optim.MultiOptimizer(
        [adamw(options.score_rate), adamw(options.projection_rate), adamw(options.lora_rate)],
        [
            lambda name, _: part_of(name) == "score",
            lambda name, _: part_of(name) == "projection",
        ],
    )
    optimizer.init(student.trainable_parameters())
    return optimizer


def update(
    student: Student,
    expert: Loaded,
    optimizer: optim.Optimizer,
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    loss_options: LossOptions,
    training: TrainingOptions,
    vocab: int,
) -> Update:
    """One optimiser step on the weighted losses.

    The total is the sum over losses of ``weights[name]`` times the loss's sum over all samples,
    divided by its valid tokens (samples) in the whole update, so that micro-batches of any size
    give the same gradient.

    Args:
        student: changed in place, unless a loss or gradient is not finite.
        expert: gives the expert's logits.
        optimizer: of :func:`make_optimizer`.
        samples: at least one.
        weights: the gate's weight times the loss's scale, for each loss.
        loss_options: which losses, and how.
        training: clipping, micro-batch and checkpointing.
        vocab: tokens the two models share.
    """
    norms = counts(samples, loss_options)

    def weighted(batch: Batch) -> tuple[mx.array, Sums]:
        sums = loss_sums(
            student, expert, batch, loss_options, vocab, recompute=training.checkpoint_layers
        )
        total = sum(
            (
                weights[name] * mean(value, mx.array(norms[name]))
                for name, (value, _) in sums.items()
            ),
            start=mx.array(0.0),
        )
        return total * scale, sums

    scale = _loss_scale(student)
    step = nn.value_and_grad(student, weighted)
    gradients = None
    total = 0.0
    values = dict.fromkeys(norms, 0.0)
    for chunk in _chunks(samples, training.micro_batch):
        (value, sums), part = step(collate(chunk))
        gradients = part if gradients is None else tree_map(mx.add, gradients, part)
        mx.eval(value, sums, gradients)
        total += float(value) / scale
        for name, (loss, _) in sums.items():
            values[name] += float(loss)
    gradients = tree_map(lambda gradient: gradient / scale, gradients)
    clipped, norm = optim.clip_grad_norm(gradients, training.clip or math.inf)
    gradient_norm = float(norm)
    losses = {name: values[name] / norms[name] for name in norms if norms[name]}
    skipped = not (math.isfinite(total) and math.isfinite(gradient_norm))
    if not skipped:
        optimizer.update(student, clipped)
        mx.eval(student.trainable_parameters(), optimizer.state)
    tokens = sum(len(s.prompt) + len(s.target) - 1 for s in samples)
    return Update(losses, total, gradient_norm, skipped, tokens)


def _loss_scale(student: Student) -> float:
    """Keeps small gradients of a float16 model above what float16 can hold; 1 for other types."""
    weights = tree_flatten(student.model.parameters())
    return _FLOAT16_SCALE if any(value.dtype == mx.float16 for _, value in weights) else 1.0


def _chunks(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Micro-batches of samples of about the same length, so that little of them is padding."""
    by_length = sorted(samples, key=lambda s: len(s.prompt) + len(s.target))
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimiser's state as named arrays, to save."""
    return dict(tree_flatten(optimizer.state))
