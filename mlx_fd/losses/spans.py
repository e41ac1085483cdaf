"""Where in its text each token stands, by decoding alone, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

Span = tuple[int, int]
Decode = Callable[[list[int]], str]

# How many tokens are decoded at once, and how many of them the next window begins with.
_WINDOW, _CONTEXT = 32, 8
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_spans(decode: Decode, tokens: Sequence[int]) -> tuple[str, list[Span]]:
    """Where in its text each token stands.

    A token ends where the text of all tokens up to it ends, so this holds for generated tokens too,
    which a tokenizer might split otherwise. Of the tokens that share a character, the first stands
    on it; the others, as tokens that write nothing, have empty spans. The time is linear in N, but
    for hundreds of tokens in a row that are broken characters and nothing else.

    Args:
        decode: tokens to text, as the tokenizer does it.
        tokens: of one text, N of them.

    Returns:
        The text, and for each token the half-open range of its characters; together they cover it.
    """
    tokens = list(tokens)
    text, ends = decode(tokens), _prefix_lengths(decode, tokens)
    if ends and ends[-1] != len(text):  # what a token writes depends on one far before it
        ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
    # Half a character may decode to more characters than the whole.
    for i in reversed(range(len(ends) - 1)):
        ends[i] = min(ends[i], ends[i + 1])
    return text, list(pairwise([0, *ends]))


def _prefix_lengths(decode: Decode, tokens: list[int]) -> list[int]:
    """How many characters the first 1, 2, ... N tokens write, decoding a window of them at a time.

    A window begins beside a token of whole characters, or in a run of others where a character is
    complete. A tokenizer that falls back to bytes makes text of a run of bytes only if all of it is
    text: where a run ends broken, the window goes back to where it stood before the run.
    """
    whole = _whole(decode, tokens)
    lengths: list[int] = []
    cuts = [0]  # where a window may begin
    window = before_run = (0, 0)  # its first token, and how much longer its prefix's text is
    run = complete = 0
    for i in range(len(tokens)):
        if i and (whole[i] or whole[i - 1]):
            run, complete, before_run = i, i, window
            cuts.append(i)
        start, shift = window
        text = decode(tokens[start : i + 1])
        lengths.append(shift + len(text))
        run_ends = i + 1 == len(tokens) or whole[i] or whole[i + 1]
        if _BROKEN not in text[lengths[run - 1] - shift if run > start else 0 :]:
            complete = i + 1
            if not run_ends:
                cuts.append(complete)
        elif run_ends:
            while cuts[-1] > run:
                cuts.pop()
            if start > run:
                window = start, shift = before_run
                for j in range(complete, i + 1):
                    lengths[j] = shift + len(decode(tokens[start : j + 1]))
        if i + 1 - start >= _WINDOW and (run_ends or complete == i + 1):
            start = next(cut for cut in reversed(cuts) if cut <= i + 1 - _CONTEXT)
            window = start, lengths[i] - len(decode(tokens[start : i + 1]))
    return lengths


def _whole(decode: Decode, tokens: list[int]) -> list[bool]:
    """Which tokens write whole characters whatever stands beside them.

    Not those that are a part of a character, nor the letters among the bytes that a tokenizer falls
    back to, nor what is left out of a text: bytes before and after it make one character.
    """
    alone = {token: decode([token]) for token in set(tokens)}
    broken = next((token for token in tokens if _BROKEN in alone[token]), None)
    if broken is None:
        return [True] * len(tokens)
    whole = {
        token: _BROKEN not in text
        and decode([token, broken]).startswith(text)
        and decode([token, token]) != ""
        for token, text in alone.items()
    }
    return [whole[token] for token in tokens]
