"""One distillation update of the student, on texts that the expert has read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_fd.config import LossOptions, TrainingOptions
from mlx_fd.feedback.collate import collate_tokens, concatenate_targets, micro_batches, pad
from mlx_fd.feedback.loss_terms import LOSSES, Forwarded
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Batch, OwnTexts, Sample
from mlx_fd.losses.comparison import top_k_gap
from mlx_fd.losses.divergence import Target, fused_linear_divergences
from mlx_fd.losses.teacher import TopK, one_hot
from mlx_fd.models import metering, ranks
from mlx_fd.models.attention_taps import LOG_ZERO
from mlx_fd.models.loading import Loaded
from mlx_fd.models.lora import dropping
from mlx_fd.models.merging import merged
from mlx_fd.models.onward import keeping
from mlx_fd.models.student import Student, parameter_group
from mlx_fd.models.thinking import shared_length
from mlx_fd.runs.records.summary import TopKRow

_FLOAT16_SCALE = 1024.0


@dataclass(frozen=True)
class Update:
    """What one optimiser step did.

    Attributes:
        losses: the mean losses before the step.
        total: the weighted sum that was minimised.
        gradient_norm: before clipping.
        skipped: the loss or its gradient was not finite, and nothing was changed.
        tokens: what the student read, padding aside.
        read: the same with what it read for the score head besides, where that was counted.
        seconds: what it took, where that was measured.
        clipped: share of tokens whose ratio a policy's loss clipped.
        each: the mean losses of each sample before the step, in order.
    """

    losses: dict[str, float]
    total: float
    gradient_norm: float
    skipped: bool
    tokens: int
    seconds: float = 0.0
    clipped: float = 0.0
    each: tuple[dict[str, float], ...] = ()
    read: int = 0


def collate(samples: Sequence[Sample], *, goes_on: bool = False) -> Batch:
    """Samples as one batch.

    Args:
        samples: at least one.
        goes_on: whether the student's own feedback is read on from where it begins to differ from
            the sample's text.
    """
    length = max(len(s.target) for s in samples)
    tokens, positions = collate_tokens(samples)
    width = tokens.shape[1]

    def attention(layer: mx.array) -> mx.array:
        _, queries, keys = layer.shape
        padding = [(0, 0), (0, length - queries), (0, width - keys)]
        return mx.pad(layer, padding, constant_values=LOG_ZERO)

    rows = [number * length + t for number, s in enumerate(samples) for t in range(len(s.target))]
    return Batch(
        tokens=tokens,
        positions=pad(positions, length),
        mask=mx.array([[float(t < len(s.target)) for t in range(length)] for s in samples]),
        rows=mx.array(rows),
        targets=mx.array([token for s in samples for token in s.target]),
        weights={
            name: mx.array([weight for s in samples for weight in loss.token_weights(s)])
            for name, loss in LOSSES.items()
            if loss.token_weights is not None
        },
        expert_expects=concatenate_targets([s.expert.targets for s in samples]),
        expert_pooled=_stacked([s.expert.pooled for s in samples]),
        expert_attention=_stacked([[attention(a) for a in s.expert.attention] for s in samples]),
        scores=mx.array([s.expert_score or 0.0 for s in samples]),
        score_mask=mx.array([float(s.expert_score is not None) for s in samples]),
        own=_own_texts(samples, goes_on),
    )


def _own_texts(samples: Sequence[Sample], goes_on: bool) -> OwnTexts | None:
    rows = [k for k, s in enumerate(samples) if s.own and s.expert_score is not None]
    if not rows:
        return None
    begun = [_begun(samples[row]) if goes_on else 0 for row in rows]
    texts = [samples[row].own[length:-1] for row, length in zip(rows, begun, strict=True)]
    return OwnTexts(
        tokens=pad(texts, max(map(len, texts))),
        ends=mx.array([len(text) - 1 for text in texts]),
        rows=mx.array(rows),
        begun=mx.array(begun) if goes_on else None,
    )


def _begun(sample: Sample) -> int:
    """How many tokens of the student's own feedback are read with the sample's text already."""
    read = (*sample.prompt, *sample.target[:-1])
    return min(shared_length(sample.own, read), len(sample.own) - 2)


def _stacked(of_samples: Sequence[Sequence[mx.array]]) -> list[mx.array]:
    """For each layer, its arrays of all samples as one."""
    return [mx.stack(list(layer)) for layer in zip(*of_samples, strict=True)]


def counts(samples: Sequence[Sample], options: LossOptions) -> dict[str, float]:
    """What each loss of an update is divided by: its valid tokens, samples or steps."""
    return {name: LOSSES[name].count(samples) for name in options.losses}


def loss_rows(
    student: Student,
    expert: Loaded,
    batch: Batch,
    options: LossOptions,
    vocab: int,
    factors: Mapping[str, float] | None = None,
    *,
    recompute: bool = False,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Each enabled loss on each sample of a batch.

    Args:
        student: its forward pass is what the total is differentiated through.
        expert: its head turns the kept hidden states into the expert's logits.
        batch: B samples of at most T tokens.
        options: which losses, and how.
        vocab: tokens the two models share.
        factors: what each loss's sum is multiplied by in the total; ``None`` where nothing is to be
            learned.
        recompute: keep no activations of a block, and run it again for its gradient.

    Returns:
        The total, differentiable; and for each loss its sum over the tokens of each sample, [B].
    """
    goes_on = batch.own is not None and batch.own.begun is not None
    with nullcontext() if recompute else merged(student.model):
        kept = keeping(student.view) if goes_on else None
        seen = student.view.forward(
            batch.tokens, kept, recompute=recompute, attention=options.needs_attention
        )
        final = mx.take_along_axis(seen.final, batch.positions[..., None], axis=1)
        made = Forwarded(student, seen, final, batch, options, kept)
        total, found = _token_losses(made, expert, vocab, factors)
        for name in options.losses:
            if (compute := LOSSES[name].compute) is not None:
                found[name] = compute(made)
    for name in options.losses:
        if factors is not None and name not in batch.weights:
            total = total + factors[name] * found[name].sum()
    return total, {name: found[name] for name in options.losses}


def _token_losses(
    made: Forwarded, expert: Loaded, vocab: int, factors: Mapping[str, float] | None
) -> tuple[mx.array, dict[str, mx.array]]:
    """The losses on next-token distributions: their weighted sum, and each one by sample."""
    final, batch, options = made.final, made.batch, made.options
    groups = [
        [name for name in options.losses if LOSSES[name].matches == what]
        for what in ("tokens", "teacher")
    ]
    with_tokens, with_teacher = groups
    if not with_tokens and not with_teacher:
        return mx.array(0.0), {}

    def weights(names: Sequence[str]) -> mx.array:
        weighted = [(factors or {}).get(name, 1.0) * batch.weights[name] for name in names]
        return mx.stack(weighted).sum(axis=0)

    head = made.student.view.head
    targets = []
    if with_tokens:
        # Over padding too, as when the student generates.
        rows = made.student.view.rows
        sure = one_hot(batch.targets)
        targets.append(Target(sure, None, weights(with_tokens), "forward", 1.0, rows))
    if with_teacher:
        targets.append(
            Target(
                batch.expert_expects,
                expert.view.head,
                weights(with_teacher),
                options.kl,
                options.loss_temperature,
                vocab,
                standardize=options.standardize_logits,
            )
        )
    total, values = fused_linear_divergences(
        final.reshape(-1, final.shape[-1])[batch.rows],
        head,
        targets,
        differentiable=factors is not None,
    )
    columns = [group for group in groups if group]
    owners = batch.rows // batch.mask.shape[1]
    nothing = mx.zeros(len(batch.tokens))
    return total, {
        name: nothing.at[owners].add(batch.weights[name] * values[:, place])
        for place, group in enumerate(columns)
        for name in group
    }


def measure(
    student: Student,
    expert: Loaded,
    samples: Sequence[Sample],
    options: LossOptions,
    vocab: int,
    micro_batch: int,
) -> dict[str, float]:
    """The mean losses on some samples, without learning; a loss nothing is known of is left out.

    Each rank measures its share of the samples, which are the same on all ranks.
    """
    mine = ranks.share(samples)
    each = ranks.gather(measure_each(student, expert, mine, options, vocab, micro_batch))
    return mean_losses(each, samples, options)


def mean_losses(
    each: Sequence[Mapping[str, float]], samples: Sequence[Sample], options: LossOptions
) -> dict[str, float]:
    """The mean losses over all tokens (samples) of some samples, from those of each."""
    norms = counts(samples, options)
    sums = {
        name: math.fsum(
            of[name] * LOSSES[name].count([sample])
            for of, sample in zip(each, samples, strict=True)
            if name in of
        )
        for name in norms
    }
    return {name: sums[name] / norms[name] for name in norms if norms[name]}


@metering.counted(metering.MEASURING)
def measure_each(
    student: Student,
    expert: Loaded,
    samples: Sequence[Sample],
    options: LossOptions,
    vocab: int,
    micro_batch: int,
) -> list[dict[str, float]]:
    """:func:`measure` of each sample by itself, side by side in forward passes."""
    found: list[dict[str, float]] = [{} for _ in samples]
    for chunk in micro_batches(samples, micro_batch):
        part = [samples[index] for index in chunk]
        batch = collate(part, goes_on=student.goes_on)
        _, rows = loss_rows(student, expert, batch, options, vocab)
        for index, losses in zip(chunk, means_of(rows, part), strict=True):
            found[index] = losses
    return found


def means_of(rows: Mapping[str, mx.array], samples: Sequence[Sample]) -> list[dict[str, float]]:
    """Each sample's mean losses; one that nothing is known of is left out.

    Args:
        rows: of :func:`loss_rows`.
        samples: those of its batch.
    """
    mx.eval(rows)
    values: dict[str, list[float]] = {name: of.tolist() for name, of in rows.items()}  # type: ignore[misc]
    return [
        {
            name: of[place] / count
            for name, of in values.items()
            if (count := LOSSES[name].count([sample]))
        }
        for place, sample in enumerate(samples)
    ]


def top_k_error(
    student: Student, samples: Sequence[Sample], options: LossOptions, vocab: int
) -> TopKRow:
    """What a top k of the expert's distributions leaves out, on some samples.

    Args:
        student: as it is now.
        samples: each with a top k.
        options: its kind, its temperature and k.
        vocab: tokens the two models share.

    Returns:
        k; the mean probability of all other tokens; and by how much the mean divergence is too
        small at most (``None``: no bound is known).
    """
    bounds: list[float] = []
    tails: list[float] = []
    for sample in samples:
        batch = collate([sample])
        assert isinstance(batch.expert_expects, TopK)
        final = student.view.forward(batch.tokens).final[0]
        bound, tail = top_k_gap(
            final[batch.positions[0]],
            student.view.head,
            batch.expert_expects,
            kind=options.kl,
            temperature=options.loss_temperature,
            vocab=vocab,
        )
        bounds.extend(map(float, np.array(bound)))
        tails.extend(map(float, np.array(tail)))
    mean = math.fsum(bounds) / len(bounds)
    return {
        "k": options.teacher_top_k,
        "tail_mass": math.fsum(tails) / len(tails),
        "missing_at_most": mean if math.isfinite(mean) else None,
    }


def make_optimizer(student: Student, options: TrainingOptions) -> optim.MultiOptimizer:
    """AdamW with a learning rate for each part: score head, projection, the student's weights."""

    def adamw(rate: float) -> optim.AdamW:
        return optim.AdamW(rate, weight_decay=options.weight_decay, bias_correction=True)

    optimizer = optim.MultiOptimizer(
        [adamw(options.score_rate), adamw(options.projection_rate), adamw(options.lora_rate)],
        [
            lambda name, _: parameter_group(name) == "score",
            lambda name, _: parameter_group(name) == "projection",
        ],
    )
    optimizer.init(student.trainable_parameters())
    return optimizer


def set_rates(optimizer: optim.MultiOptimizer, options: TrainingOptions, progress: float) -> None:
    """Set the learning rates of :func:`make_optimizer`'s parts, by ``lr_schedule``.

    Args:
        optimizer: changed in place.
        options: the rates at the run's beginning, and their schedule.
        progress: share of the run's updates that is done, in [0, 1).
    """
    left = 1.0 - progress if options.lr_schedule == "linear" else 1.0
    rates = (options.score_rate, options.projection_rate, options.lora_rate)
    for part, rate in zip(optimizer.optimizers, rates, strict=True):
        part.learning_rate = rate * left


@metering.counted(metering.LEARNING)
def update(
    pair: Pair,
    optimizer: optim.Optimizer,
    samples: Sequence[Sample],
    weights: Mapping[str, float],
    losses: LossOptions,
    training: TrainingOptions,
    auxiliary_loss: Callable[[], tuple[Any, float]] | None = None,
) -> Update:
    """One optimiser step on the weighted losses.

    The total is the sum over losses of ``weights[name]`` times the loss's sum over all samples,
    divided by its valid tokens (samples) in the whole update, so that micro-batches of any size
    give the same gradient, and so do any number of ranks, among which the samples are dealt out.

    Args:
        pair: the student is changed in place, unless a loss or gradient is not finite.
        optimizer: of :func:`make_optimizer`.
        samples: at least one, the same on all ranks; a loss is over the tokens (samples) of all of
            them.
        weights: the gate's weight times the loss's scale, for each loss.
        losses: which of them, and how.
        training: clipping, micro-batch and checkpointing.
        auxiliary_loss: gives the gradient of one more loss by the language model's weights, and
            that loss, which is called ``self`` and weighed by ``student_context_weight``.
    """
    begin = time.perf_counter()
    student = pair.student
    norms = counts(samples, losses)
    factors = {name: weights[name] / norms[name] if norms[name] else 0.0 for name in norms}

    def weighted(batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        total, rows = loss_rows(
            student,
            pair.expert,
            batch,
            losses,
            pair.vocab,
            factors,
            recompute=training.grad_checkpoint,
        )
        return total * scale, rows

    # What is run again for its gradient leaves nothing to go on from.
    goes_on = student.goes_on and not training.grad_checkpoint
    scale = loss_scale(student.model)
    step = nn.value_and_grad(student, weighted)
    gradients: Any = None
    total = 0.0
    mine = ranks.deal([len(one.prompt) + len(one.target) for one in samples])
    found: list[tuple[int, dict[str, float]]] = []
    done = steps_taken(optimizer)
    for number, chunk in enumerate(
        micro_batches([samples[index] for index in mine], training.micro_batch)
    ):
        texts = [samples[mine[place]] for place in chunk]
        with dropping(student.model, done, number * ranks.size() + ranks.index()):
            (value, rows), added = step(collate(texts, goes_on=goes_on))
        gradients = added if gradients is None else tree_map(mx.add, gradients, added)
        mx.eval(value, rows, gradients)
        total += float(value) / scale
        found += zip((mine[place] for place in chunk), means_of(rows, texts), strict=True)
    if gradients is None:
        gradients = tree_map(mx.zeros_like, student.trainable_parameters())
    gradients = ranks.add_gradients(gradients)
    total = ranks.add({"total": total})["total"]
    by_index = dict(ranks.gather(found))
    each = [by_index[index] for index in range(len(samples))]
    means = mean_losses(each, samples, losses)
    gradients = tree_map(lambda gradient: gradient / scale, gradients)
    if auxiliary_loss is not None:
        share = losses.student_context_weight
        grads, means["self"] = auxiliary_loss()
        gradients["model"] = tree_map(
            lambda main, auxiliary: main + share * auxiliary, gradients["model"], grads
        )
        total += share * means["self"]
    gradient_norm, skipped = take_step(student, optimizer, gradients, total, training)
    tokens = sum(len(s.prompt) + len(s.target) - 1 for s in samples)
    own = sum(
        len(s.own) - 1 - (_begun(s) if goes_on else 0)
        for s in samples
        if s.own and s.expert_score is not None
    )
    return Update(
        losses=means,
        total=total,
        gradient_norm=gradient_norm,
        skipped=skipped,
        tokens=tokens,
        seconds=time.perf_counter() - begin,
        each=tuple(each),
        read=tokens + (own if "score" in losses.losses else 0),
    )


def take_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    gradients: Any,
    total: float,
    training: TrainingOptions,
) -> tuple[float, bool]:
    """Change a model's weights by their gradients, clipped; not where something is not finite.

    Args:
        model: changed in place.
        optimizer: of its trainable weights.
        gradients: of the same, as a tree.
        total: the loss; where it is not finite, nothing is changed.
        training: the norm that gradients are clipped to.

    Returns:
        The gradients' norm before clipping, and whether the step was skipped.
    """
    clipped, norm = optim.clip_grad_norm(gradients, training.max_grad_norm or math.inf)
    skipped = not (math.isfinite(total) and math.isfinite(float(norm)))
    if not skipped:
        optimizer.update(model, clipped)
        mx.eval(model.trainable_parameters(), optimizer.state)
    return float(norm), skipped


def loss_scale(model: nn.Module) -> float:
    """Keeps small gradients of a float16 model above what float16 can hold; 1 for other types."""
    weights = tree_flatten(model.parameters())
    return _FLOAT16_SCALE if any(value.dtype == mx.float16 for _, value in weights) else 1.0


def steps_taken(optimizer: optim.Optimizer) -> int:
    """How many steps an optimiser has taken, those before a checkpoint included."""
    counts = [v for name, v in tree_flatten(optimizer.state) if name.rpartition(".")[2] == "step"]
    return int(max((int(count) for count in counts), default=0))


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimiser's state as named arrays, to save."""
    return dict(tree_flatten(optimizer.state))
