"""One update: what student and self-teacher say of each attempt, and one step towards it.

First everything is read that is held constant: the student's own log-probabilities, and with other
adapters the teacher's. From these numbers alone comes what each token counts. Only then does the
student read once more, now for its gradient, which the engine of the losses makes without logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx import nn
from mlx.utils import tree_map

from mlx_fd.config import Config, Method, TrainingOptions
from mlx_fd.feedback.collate import collate_tokens, concatenate_targets, micro_batches
from mlx_fd.feedback.distill import Update, loss_scale, take_step
from mlx_fd.feedback.samples import reader_fingerprint
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.losses.divergence import (
    Compared,
    Target,
    TopK,
    compare_distributions,
    fused_linear_divergences,
    one_hot,
    teacher_at,
    teacher_top_k,
    token_log_probabilities,
)
from mlx_fd.models import ranks
from mlx_fd.models.generation import first_prompt, with_thought
from mlx_fd.models.loading import Loaded
from mlx_fd.models.logit_transform import LogitSource
from mlx_fd.models.view import View as ModelView
from mlx_fd.training.selfdistill import objectives
from mlx_fd.training.selfdistill.contexts import Attempt, View
from mlx_fd.training.selfdistill.teacher import Weights, adapter, adapter_swapped, zero_adapter

DIVERGENCES = ("forward", "reverse", "jsd")
# EchoDistill's text names no direction; this is the one that keeps what the teacher may say.
_KINDS = {"echo": "forward", **{name: name for name in DIVERGENCES}}
_POLICIES = ("grpo", "contrastive", "echo")
# Likeliest tokens that student and teacher are asked whether they share.
OVERLAP_TOP_K = 10


@dataclass(frozen=True)
class Text:
    """Tokens before a text, and the T tokens of the text.

    Attributes:
        prompt: all that is read before it, a thought among it.
        target: the text.
        opening: the tokens of that thought, with its marks.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    opening: tuple[int, ...] = ()


def text_after(
    loaded: Loaded, message: str, target: tuple[int, ...], opening: tuple[int, ...]
) -> Text:
    """A text as the reply to a user's first message, after the thought that it came from."""
    prompt = with_thought(loaded, first_prompt(loaded, message), opening)
    return Text(prompt, target, opening)


@dataclass(frozen=True)
class RolloutStats:
    """All that is held constant of one text while the student learns from it.

    Attributes:
        text: as the student reads it.
        group: which problem it is an attempt at, counted from 0.
        reward: 1 for a right answer, 0 for a wrong one and where nobody knows.
        finished: whether it ended itself, and not at the token limit.
        old: [T], log-probabilities when the tokens were drawn.
        now: [T], the student's, at the beginning of the update.
        entropy: [T], of the student's distributions.
        teacher: [T], the self-teacher's; ``None``: this text teaches nothing.
        targets: the self-teacher's distributions, where they are matched: its final hidden states
            [T, d], or its logits of some tokens.
        wrong: [K, T], the self-teacher's with wrong hints; ``None``: there are none.
        reference: [T], the base model's, where the loss needs them.
        likely: whether its own likelihood is raised, where that is the objective.
        own: whether this rank reads it for its gradient; another one's has no ``targets``.
        overlap: [T], of the teacher's :data:`OVERLAP_TOP_K` likeliest tokens the share that are
            among the student's; ``None`` without a teacher.
        reverse_kl: [T], KL(student || teacher) in nats; likewise.
    """

    text: Text
    group: int
    reward: float
    finished: bool
    old: mx.array
    now: mx.array
    entropy: mx.array
    teacher: mx.array | None = None
    targets: mx.array | TopK | None = None
    wrong: mx.array | None = None
    reference: mx.array | None = None
    likely: bool = False
    overlap: mx.array | None = None
    reverse_kl: mx.array | None = None
    own: bool = True

    @property
    def advantages(self) -> mx.array | None:
        """A_t = log pi_T(y_t) - log pi_S(y_t), [T]."""
        if self.teacher is None:
            return None
        return objectives.token_advantages(self.teacher, self.now)


# What of a text's numbers decides what its tokens count, and is shown.
_GATHERED = ("old", "now", "entropy", "teacher", "wrong", "reference", "overlap", "reverse_kl")


def gather_stats(own: Sequence[RolloutStats]) -> list[RolloutStats]:
    """Those of all ranks (:mod:`mlx_fd.models.ranks`), rank 0's first.

    What a text is matched to stays with the rank that reads it.
    """
    if ranks.size() == 1:
        return list(own)
    rows = ranks.gather(
        [
            (vars(item.text), item.group, item.reward, item.finished, item.likely, ranks.index())
            for item in own
        ]
    )
    arrays = ranks.gather_arrays(
        [
            {name: array for name in _GATHERED if (array := getattr(item, name)) is not None}
            for item in own
        ]
    )
    mine = iter(own)
    return [
        next(mine)
        if rank == ranks.index()
        else RolloutStats(
            text=Text(**{name: tuple(tokens) for name, tokens in text.items()}),
            group=group,
            reward=reward,
            finished=finished,
            likely=likely,
            own=False,
            **named,
        )
        for (text, group, reward, finished, likely, rank), named in zip(rows, arrays, strict=True)
    ]


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


def read(model: ModelView, texts: Sequence[Text], size: int) -> list[mx.array]:
    """Final hidden states [T, d] where each text's tokens are predicted, ``size`` texts at once."""
    states: dict[int, mx.array] = {}
    for indices in micro_batches(texts, size):
        chunk = [texts[index] for index in indices]
        rows = mx.stop_gradient(_final_states(model, chunk))
        states.update(zip(indices, _split(rows, chunk), strict=True))
        mx.eval([states[index] for index in indices])
    return [states[index] for index in range(len(texts))]


def _final_states(model: ModelView, texts: Sequence[Text], *, recompute: bool = False) -> mx.array:
    """Final hidden states [N, d] where the N tokens of all texts are predicted, texts in a row."""
    tokens, positions = collate_tokens(texts)
    width = tokens.shape[1]
    rows = [number * width + at for number, part in enumerate(positions) for at in part]
    final = model.forward(tokens, recompute=recompute).final
    return final.reshape(-1, final.shape[-1])[mx.array(rows)]


def _split(rows: mx.array, texts: Sequence[Text]) -> list[mx.array]:
    """Rows of all texts' tokens, text by text."""
    parts, at = [], 0
    for text in texts:
        parts.append(rows[at : at + len(text.target)])
        at += len(text.target)
    return parts


def token_logprobs(
    head: LogitSource,
    states: Sequence[mx.array],
    texts: Sequence[Text],
    options: Method,
    vocab: int,
) -> list[tuple[mx.array, mx.array]]:
    """Log-probabilities of texts' tokens and the distributions' entropies, [T] each.

    Args:
        head: of the model that gave the states.
        states: the final hidden states of :func:`read`, one array for each text.
        texts: N tokens in all.
        options: the temperature that logits are divided by.
        vocab: V, the tokenizer's tokens; rows of the head beyond are padding.
    """
    tokens = mx.array([token for text in texts for token in text.target])
    both = token_log_probabilities(
        mx.concatenate(list(states)),
        head,
        tokens,
        temperature=options.temperature,
        vocab=vocab,
    )
    logprobs, entropies = (_split(values, texts) for values in both)
    return list(zip(logprobs, entropies, strict=True))


def matches_distributions(options: Method) -> bool:
    """Whether whole distributions are matched, and not just the tokens that were drawn."""
    return options.objective in _KINDS


@dataclass(frozen=True)
class Expert:
    """A teacher that is another model than the student, with the same tokens and chat template.

    Attributes:
        model: the expert.
        cache: keeps its likeliest tokens on what it wrote itself; ``None``: it reads that again.
    """

    model: Loaded
    cache: TeacherCache | None = None


def expert_cache(
    folder: Path, expert: Loaded, vocab: int, options: Method, warn: Callable[[str], None]
) -> TeacherCache | None:
    """Where an expert's likeliest tokens are kept; ``None`` where others are compared.

    Args:
        folder: of the entries.
        expert: the expert.
        vocab: tokens that it shares with the student.
        options: the support and its size, the temperature.
        warn: told of entries that cannot be used.
    """
    if options.support != "teacher" or options.objective not in DIVERGENCES:
        return None
    kept = {
        "answers": True,
        "vocab": vocab,
        "top_k": options.loss_top_k,
        "temperature": options.temperature,
    }
    return TeacherCache(folder, {**reader_fingerprint(expert), **kept}, warn)


def wants_teacher(options: Method) -> bool:
    """Whether the teacher has a part in the loss."""
    return options.objective not in ("grpo", "likelihood")


def forward_teacher_and_student(
    student: Loaded,
    teacher: Weights,
    groups: Sequence[Sequence[Attempt]],
    views: Sequence[View],
    options: Method,
    size: int,
    expert: Expert | None = None,
) -> list[RolloutStats]:
    """Read attempts as the student and as its teacher; each rank reads its share of the problems.

    Args:
        student: the student and its tokenizer; its adapter is on.
        teacher: the self-teacher's LoRA weights, by name.
        groups: attempts, problem by problem.
        views: one for each attempt, in the same order.
        options: which of them are wanted, and at which temperature.
        size: texts to read at once.
        expert: the teacher, where it is another model; ``teacher`` does not count then.

    Returns:
        One for each attempt, in order.
    """
    model, tokenizer, vocab = student.model, student.tokenizer, student.vocab
    lm = student.view
    mine = ranks.part(len(groups))
    views = views_of(groups, views, mine)
    attempts = [attempt for number in mine for attempt in groups[number]]
    numbers = [number for number in mine for _ in groups[number]]
    if not attempts:
        return gather_stats([])
    texts = [
        text_after(student, view.student, attempt.tokens, attempt.opening)
        for view, attempt in zip(views, attempts, strict=True)
    ]
    states = read(lm, texts, size)
    taught = [
        index
        for index, view in enumerate(views)
        if view.teacher is not None and wants_teacher(options)
    ]
    kept = set[int]()
    if expert is not None and expert.cache is not None:
        kept = {index for index in taught if not attempts[index].own}
    taught = [index for index in taught if index not in kept]
    alone = sorted(set(range(len(texts))) - set(taught))
    said: dict[int, _Said] = {}
    if alone:
        parts = [states[index] for index in alone], [texts[index] for index in alone]
        scored = token_logprobs(lm.head, *parts, options, vocab)
        said |= {
            index: _Said(logprobs, entropy)
            for index, (logprobs, entropy) in zip(alone, scored, strict=True)
        }
    for index in kept:
        assert expert is not None
        said[index] = _with_kept(said[index], student, expert, texts[index], options)
    if taught:
        chosen = (
            [texts[index] for index in taught],
            [views[index] for index in taught],
            [states[index] for index in taught],
        )
        reader = student if expert is None else expert.model
        # A self-teacher is the student with another adapter.
        with nullcontext() if expert is not None else adapter_swapped(model, teacher):
            with_teacher = _read_by_teacher(student, reader, *chosen, options, size)
        said |= dict(zip(taught, with_teacher, strict=True))
    reference: Sequence[mx.array | None] = [None] * len(texts)
    if options.kl_coef:
        with adapter_swapped(model, zero_adapter(adapter(model))):
            base = token_logprobs(lm.head, read(lm, texts, size), texts, options, vocab)
        reference = [logprobs for logprobs, _ in base]
    return gather_stats(
        [
            RolloutStats(
                text=text,
                group=numbers[index],
                reward=float(bool(attempt.correct)),
                finished=attempt.tokens[-1] in tokenizer.eos_token_ids,
                # What another model wrote was not drawn from this one: no ratio is taken of it.
                old=mx.array(attempt.logprobs) if attempt.own else said[index].now,
                likely=not attempt.own and views[index].teacher is not None,
                reference=reference[index],
                **vars(said[index]),
            )
            for index, (text, attempt) in enumerate(zip(texts, attempts, strict=True))
        ]
    )


def views_of(
    groups: Sequence[Sequence[Attempt]], views: Sequence[View], chosen: range
) -> Sequence[View]:
    """The views, one for each attempt, of a few groups in a row."""
    begin = sum(map(len, groups[: chosen.start]))
    return views[begin : begin + sum(map(len, groups[chosen.start : chosen.stop]))]


@dataclass(frozen=True)
class _Said:
    """What of a text's :class:`RolloutStats` its readers say."""

    now: mx.array
    entropy: mx.array
    teacher: mx.array | None = None
    targets: mx.array | TopK | None = None
    wrong: mx.array | None = None
    overlap: mx.array | None = None
    reverse_kl: mx.array | None = None


def _with_kept(said: _Said, student: Loaded, expert: Expert, text: Text, options: Method) -> _Said:
    """What a text's readers say, the expert's part from its cache; else it reads the text alone.

    Alone: in a batch the last digits depend on the texts beside it.
    """
    cache, lm = expert.cache, expert.model.view
    assert cache is not None
    found = cache.load(text.prompt, text.target)
    if found is None:
        (states,) = read(lm, [text], 1)
        ((logprobs, _),) = token_logprobs(lm.head, [states], [text], options, student.vocab)
        top_k = teacher_targets(
            (student.view.head, lm.head), states, states, options, student.vocab
        )
        assert isinstance(top_k, TopK)
        found = {"logprobs": logprobs, **vars(top_k)}
        cache.save(text.prompt, text.target, found)
    targets = TopK(**{name: value for name, value in found.items() if name != "logprobs"})
    return dataclasses.replace(said, teacher=found["logprobs"], targets=targets)


def _read_by_teacher(
    student: Loaded,
    reader: Loaded,
    texts: Sequence[Text],
    views: Sequence[View],
    states: Sequence[mx.array],
    options: Method,
    size: int,
) -> list[_Said]:
    """What student and teacher say of texts; the teacher's weights are in the one who reads.

    The student's states are known, and the head that makes its logits of them is no part of what
    an adapter changes.
    """
    lm, own_head, vocab = reader.view, student.view.head, student.vocab

    def texts_of(messages: Sequence[str], targets: Sequence[Text]) -> list[Text]:
        return [
            text_after(student, message, text.target, text.opening)
            for message, text in zip(messages, targets, strict=True)
        ]

    teacher_rows = read(lm, texts_of([view.teacher or "" for view in views], texts), size)
    compared = compare_distributions(
        (mx.concatenate(list(states)), own_head),
        (mx.concatenate(list(teacher_rows)), lm.head),
        mx.array([token for text in texts for token in text.target]),
        k=OVERLAP_TOP_K,
        temperature=options.temperature,
        vocab=vocab,
    )
    now, entropy, teacher, overlap, reverse_kl = (
        _split(getattr(compared, field.name), texts) for field in dataclasses.fields(Compared)
    )
    targets: list[mx.array | TopK | None] = [None] * len(texts)
    if options.objective in DIVERGENCES:
        heads = own_head, lm.head
        targets = [
            teacher_targets(heads, student_row, row, options, vocab)
            for student_row, row in zip(states, teacher_rows, strict=True)
        ]
    wrong: dict[int, list[mx.array]] = {}
    hints = [(index, hint) for index, view in enumerate(views) for hint in view.wrong]
    if hints:
        hinted = texts_of([hint for _, hint in hints], [texts[index] for index, _ in hints])
        of_hints = token_logprobs(lm.head, read(lm, hinted, size), hinted, options, vocab)
        for (index, _), (logprobs, _) in zip(hints, of_hints, strict=True):
            wrong.setdefault(index, []).append(logprobs)
    return [
        _Said(
            now=now[index],
            entropy=entropy[index],
            teacher=teacher[index],
            targets=targets[index],
            wrong=mx.stack(wrong[index]) if index in wrong else None,
            overlap=overlap[index],
            reverse_kl=reverse_kl[index],
        )
        for index in range(len(texts))
    ]


def teacher_targets(
    heads: tuple[LogitSource, LogitSource],
    student: mx.array,
    teacher: mx.array,
    options: Method,
    vocab: int,
) -> mx.array | TopK:
    """What of the teacher's distributions is kept: its states, or its logits of some tokens.

    Args:
        heads: the student's and the teacher's.
        student: [T, d], the student's final hidden states.
        teacher: [T, d], the teacher's.
        options: on which tokens distributions are compared.
        vocab: V, the tokenizer's tokens.
    """
    if options.support == "all":
        return teacher
    how: dict[str, Any] = {"temperature": options.temperature, "vocab": vocab}
    own, head = heads
    if options.support == "teacher":
        return teacher_top_k(teacher, head, k=options.loss_top_k, **how)
    likeliest = teacher_top_k(student, own, k=options.loss_top_k, **how).indices
    return teacher_at(teacher, head, likeliest, **how)


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
    if options.objective in DIVERGENCES:
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
    if options.objective in _POLICIES or options.policy_weight:
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
        final = _final_states(lm, [item.text for item in some], recompute=training.grad_checkpoint)
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


def policy_share(options: Method) -> float:
    """The weight of a policy's loss; nothing is beside it in grpo and contrastive."""
    return 1.0 if options.objective in ("grpo", "contrastive") else options.policy_weight


def echo_weights(echoes: Sequence[RolloutStats], options: Method) -> list[mx.array]:
    """What each token of the teacher's answers counts: all the same, over all of them."""
    tokens = sum(len(item.text.target) for item in echoes)
    return [mx.full((len(item.text.target),), options.match_weight / tokens) for item in echoes]


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
