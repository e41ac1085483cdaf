"""What two tokenizers have in common: tokens that write the same, and places where both split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]

# Text before a token shows what the token writes in the middle of a text: some tokenizers leave out
# a space where a text begins with it.
_ANCHOR = "a"
_BYTE = "<0x"
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class SharedTokens:
    """Tokens that write the same text, by their ids in two tokenizers.

    Attributes:
        expert: ids of the expert's tokenizer, all different.
        student: the student's ids of the same texts, in the same order, all different.
    """

    expert: tuple[int, ...]
    student: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.expert)


def shared_tokens(expert: Any, student: Any, sizes: tuple[int, int]) -> SharedTokens:
    """The tokens that two tokenizers have in common; the first pair are those that end a turn.

    A text is compared as the tokenizer decodes it after other text, so that ``" the"`` is one token
    to byte-level and SentencePiece tokenizers alike. Tokens that are a part of a character are left
    out.

    Args:
        expert: an mlx-lm tokenizer.
        student: another one.
        sizes: how many ids each has, from 0.
    """
    ids = [
        _by_text(tokenizer, size) for tokenizer, size in zip((expert, student), sizes, strict=True)
    ]
    both = sorted(ids[0].keys() & ids[1].keys(), key=ids[0].__getitem__)
    return SharedTokens(
        (end_of_turn(expert), *(ids[0][text] for text in both)),
        (end_of_turn(student), *(ids[1][text] for text in both)),
    )


def _by_text(tokenizer: Any, count: int) -> dict[str, int]:
    """The token that writes each text, but for those that end a turn."""
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    before = _decode(tokenizer, anchor)
    decoded = tokenizer.batch_decode(
        [[*anchor, number] for number in range(count)], clean_up_tokenization_spaces=False
    )
    ends = set(tokenizer.eos_token_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    # Of two that write a letter, one may be a byte that the tokenizer falls back to elsewhere.
    order = sorted(range(count), key=lambda number: str(names[number]).startswith(_BYTE))
    found: dict[str, int] = {}
    for number in order:
        text = decoded[number].removeprefix(before)
        if text and number not in ends and _BROKEN not in text:
            found.setdefault(text, number)
    return found


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends a turn: the tokenizer's end-of-sequence token, where it is one of them.

    Args:
        tokenizer: an mlx-lm tokenizer.
    """
    ends: set[int] = set(tokenizer.eos_token_ids)
    own = tokenizer.eos_token_id
    return own if own in ends else min(ends)


def written(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, bool]:
    """The text of generated tokens, and whether they end with an end-of-turn token.

    Args:
        tokenizer: whose tokens they are.
        tokens: as they were generated.
    """
    ended = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
    return after_anchor(tokenizer, tokens[:-1] if ended else tokens), ended


def after_anchor(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens as it is in the middle of a text."""
    return decoder_within_text(tokenizer)(tokens)


def decoder_within_text(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """What turns tokens into their text as it is in the middle of a text.

    Args:
        tokenizer: whose tokens they are.
    """
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    before = _decode(tokenizer, anchor)
    return lambda tokens: _decode(tokenizer, [*anchor, *tokens]).removeprefix(before)


def encoded(
    tokenizer: Any, text: str, *, before: str = "\n", ended: bool = False
) -> tuple[int, ...]:
    """A text's tokens, as they follow other text: of several ways to split it, one that keeps it.

    Args:
        tokenizer: whose tokens are wanted.
        text: what is to be said.
        before: what stands before it.
        ended: whether the turn ends with the text.
    """
    ways = list(_encodings(tokenizer, text, before))
    tokens = next((way for way in ways if after_anchor(tokenizer, way) == text), ways[0])
    return (*tokens, *([end_of_turn(tokenizer)] if ended else []))


def _encodings(tokenizer: Any, text: str, before: str) -> Iterator[list[int]]:
    """Tokens of a text behind another; where the two share one, of the text by itself.

    By itself a text gets a space from some tokenizers, which may then be left out of it.
    """
    for lead in (before, "\n"):
        first, whole = (
            tokenizer.encode(part, add_special_tokens=False) for part in (lead, lead + text)
        )
        if whole[: len(first)] == first:
            yield whole[len(first) :]
    yield tokenizer.encode(text, add_special_tokens=False)
    yield tokenizer.encode(text.removeprefix(" "), add_special_tokens=False)


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode([*tokens], clean_up_tokenization_spaces=False))


def split_alike(
    expert: Sequence[tuple[int, Span]],
    student: Sequence[tuple[int, Span]],
    shared: SharedTokens,
) -> list[int | None]:
    """For each of the student's tokens of a text, the expert's that is the same, at the same place.

    Only there do both models predict the same thing from the same text.

    Args:
        expert: the expert's tokens, each with the characters that it writes, of
            :func:`mlx_fd.losses.spans.token_spans`.
        student: the student's, of the same text.
        shared: the tokens of both that write the same.

    Returns:
        Indices into ``expert``; ``None`` where no token is the same.
    """
    same = dict(zip(shared.expert, shared.student, strict=True))
    at = {(span, same.get(token)): index for index, (token, span) in enumerate(expert)}
    return [at.get((span, token)) for token, span in student]
