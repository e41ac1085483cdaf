"""What student and teacher say of attempts: everything that is held constant in an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fd.config import Method
from mlx_fd.feedback.collate import collate_tokens, micro_batches
from mlx_fd.feedback.samples import reader_fingerprint
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.losses.comparison import Compared, compare_distributions, token_log_probabilities
from mlx_fd.losses.teacher import TopK, teacher_at, teacher_top_k
from mlx_fd.models import ranks
from mlx_fd.models.loading import Loaded
from mlx_fd.models.logit_transform import LogitSource
from mlx_fd.models.view import View as ModelView
from mlx_fd.training.selfdistill import objectives
from mlx_fd.training.selfdistill.contexts import Attempt, View
from mlx_fd.training.selfdistill.rollout_stats import (
    OVERLAP_TOP_K,
    RolloutStats,
    Text,
    gather_stats,
    text_after,
)
from mlx_fd.training.selfdistill.teacher import Weights, adapter, adapter_swapped, zero_adapter


def read(model: ModelView, texts: Sequence[Text], size: int) -> list[mx.array]:
    """Final hidden states [T, d] where each text's tokens are predicted, ``size`` texts at once."""
    states: dict[int, mx.array] = {}
    for indices in micro_batches(texts, size):
        chunk = [texts[index] for index in indices]
        rows = mx.stop_gradient(final_states(model, chunk))
        states.update(zip(indices, split(rows, chunk), strict=True))
        mx.eval([states[index] for index in indices])
    return [states[index] for index in range(len(texts))]


def final_states(model: ModelView, texts: Sequence[Text], *, recompute: bool = False) -> mx.array:
    """Final hidden states [N, d] where the N tokens of all texts are predicted, texts in a row."""
    tokens, positions = collate_tokens(texts)
    width = tokens.shape[1]
    rows = [number * width + at for number, part in enumerate(positions) for at in part]
    final = model.forward(tokens, recompute=recompute).final
    return final.reshape(-1, final.shape[-1])[mx.array(rows)]


def split(rows: mx.array, texts: Sequence[Text]) -> list[mx.array]:
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
    logprobs, entropies = (split(values, texts) for values in both)
    return list(zip(logprobs, entropies, strict=True))


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
    if options.support != "teacher" or options.objective not in objectives.DIVERGENCES:
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
        split(getattr(compared, field.name), texts) for field in dataclasses.fields(Compared)
    )
    targets: list[mx.array | TopK | None] = [None] * len(texts)
    if options.objective in objectives.DIVERGENCES:
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
