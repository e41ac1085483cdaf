"""Two models that read the same text in tokens of their own.

Where expert and student have different tokenizers, each reads the conversation as its own template
writes it, and what the other one wrote as text. The distributions of the two can be compared only
where both write the next characters with a token of their own that is the same: there both predict
the same thing from the same text. The outcomes are the tokens that both have, and all others
together (:class:`mlx_fd.losses.teacher.TopK`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_fd.losses.spans import token_spans
from mlx_fd.models.shared_tokens import (
    decoder_within_text,
    encoded,
    end_of_turn,
    split_alike,
    written,
)

if TYPE_CHECKING:
    from mlx_fd.feedback.pair import Pair


def to_student(pair: Pair, tokens: tuple[int, ...], *, before: str = "\n") -> tuple[int, ...]:
    """The student's tokens of what the expert wrote: the same where they have one tokenizer.

    Args:
        pair: the models.
        tokens: as they were generated, with the end-of-turn token where it came.
        before: the text that stands before.
    """
    if pair.shared is None:
        return tokens
    return _translated(pair.expert.tokenizer, pair.student_lm.tokenizer, tokens, before)


def to_expert(pair: Pair, tokens: tuple[int, ...], *, before: str = "\n") -> tuple[int, ...]:
    """The expert's tokens of what the student wrote, as :func:`to_student`."""
    if pair.shared is None:
        return tokens
    return _translated(pair.student_lm.tokenizer, pair.expert.tokenizer, tokens, before)


def _translated(of: Any, to: Any, tokens: Sequence[int], before: str) -> tuple[int, ...]:
    """Another tokenizer's tokens of a text; at least one."""
    text, ended = written(of, tokens)
    return encoded(to, text, before=before, ended=ended) or (end_of_turn(to),)


def same_tokens(pair: Pair, expert: Sequence[int], student: Sequence[int]) -> list[int | None]:
    """For each of the student's tokens of a text, the expert's that is the same, at the same place.

    Args:
        pair: the models, with different tokenizers.
        expert: the expert's tokens of the text, with the end-of-turn token where it came.
        student: the student's.

    Returns:
        Indices into ``expert``; ``None`` where no token is the same.
    """
    assert pair.shared is not None
    texts, tokens, ended = [], [], []
    for tokenizer, ids in ((pair.expert.tokenizer, expert), (pair.student_lm.tokenizer, student)):
        ended.append(bool(ids) and ids[-1] in tokenizer.eos_token_ids)
        body = ids[:-1] if ended[-1] else ids
        text, spans = token_spans(decoder_within_text(tokenizer), body)
        texts.append(text)
        tokens.append(list(zip(body, spans, strict=True)))
    found = split_alike(tokens[0], tokens[1], pair.shared)
    # After a character that one of them cannot write, they have not read the same.
    different = (at for at, pair_of in enumerate(zip(*texts, strict=False)) if len({*pair_of}) > 1)
    alike = next(different, min(map(len, texts)))
    matches = [
        index if span[1] <= alike else None
        for index, (_, span) in zip(found, tokens[1], strict=True)
    ]
    if ended[1]:
        matches.append(len(expert) - 1 if ended[0] and texts[0] == texts[1] else None)
    return matches
