"""Conversations: tokens, and the model's state after exactly those tokens.

Each turn adds only its own tokens, so nothing is prefilled twice. Keys and values can be cut back
to any length. The state of a recurrence cannot, nor can a sliding window that has run full; there a
copy is made where somebody will come back to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.models.loading import Loaded
from mlx_fd.models.thinking import shared_length
from mlx_fd.models.view import Forward

Cache = list[Any]
PREFILL = 2048
"""Tokens of a prompt that are read at once, as in mlx-lm."""


@dataclass(frozen=True)
class Mark:
    """A model's state after a conversation's first ``length`` tokens, to come back to."""

    length: int
    cache: Cache


@dataclass(frozen=True)
class Conversation:
    """Tokens so far, and the prompt cache that holds exactly them (``None``: not kept).

    Conversations are values: generating from one leaves it as it was.

    Attributes:
        tokens: what was said.
        cache: the model's state after all of it.
        mark: its state further back, where ``cache`` cannot be cut back to it.
    """

    tokens: tuple[int, ...] = ()
    cache: Cache | None = None
    mark: Mark | None = None


def without_repeated_eos(conversation: Conversation, turn: tuple[int, ...]) -> tuple[int, ...]:
    """A :func:`followup_prompt` without the tokens that the conversation ends with already."""
    ended = conversation.tokens and turn and conversation.tokens[-1] == turn[0]
    return turn[1:] if ended else turn


def rewind(conversation: Conversation, length: int) -> Conversation:
    """The conversation's first ``length`` tokens, with a cache of its own where there is one.

    It is cut from the conversation's, or copied from its mark.
    """
    tokens, mark = conversation.tokens[:length], conversation.mark
    if (cut := _cut_back(conversation.cache, len(conversation.tokens) - length)) is not None:
        return Conversation(tokens, cut)
    if mark is not None and mark.length == length:
        return Conversation(tokens, copy.deepcopy(mark.cache))
    return Conversation(tokens)


def rewind_to(conversation: Conversation, tokens: Sequence[int]) -> Conversation:
    """As much of a conversation as some tokens begin with, too, but never all of the tokens."""
    length = min(shared_length(conversation.tokens, tokens), len(tokens) - 1)
    cut, mark = rewind(conversation, length), conversation.mark
    if cut.cache is None and mark is not None and mark.length < length:
        return rewind(conversation, mark.length)
    return cut


def _cut_back(cache: Cache | None, count: int) -> Cache | None:
    """A copy without the last ``count`` tokens; ``None`` where some layer no longer knows how."""
    if cache is None or not all(layer.is_trimmable() for layer in cache):
        return None
    cache = copy.deepcopy(cache)
    # A layer that lets go of what is far back may give less than it is asked for.
    return cache if all(layer.trim(count) == count for layer in cache) else None


def can_be_cut_back(cache: Cache, length: int) -> bool:
    """Whether a cache that is extended to ``length`` tokens can still be cut back then."""
    return all(
        layer.is_trimmable() and length < min(_window(layer), default=length + 1) for layer in cache
    )


def _window(layer: Any) -> list[int]:
    """How many tokens a cache's layer can hold before it lets go of some, where that is limited."""
    parts = [layer, *getattr(layer, "caches", ())]
    limits = [getattr(part, name, None) for part in parts for name in ("max_size", "chunk_size")]
    return [limit for limit in limits if limit is not None]


def forward(
    loaded: Loaded, conversation: Conversation, tokens: Sequence[int], *, attention: bool = False
) -> Forward:
    """Hidden states [1, len(tokens), d] of ``tokens`` after a conversation, left unchanged.

    Args:
        loaded: the model.
        conversation: what comes before.
        tokens: at least one.
        attention: keep what the attention weights are made of, too.
    """
    cache = copy.deepcopy(conversation.cache)
    # A window's cache keeps its tokens in order only where it is given several.
    if cache is not None and (len(tokens) > 1 or not attention):
        return loaded.view.forward(mx.array([*tokens])[None], cache, attention=attention)
    cache = make_prompt_cache(loaded.model)
    whole = mx.array([*conversation.tokens, *tokens])[None]
    return loaded.view.forward(whole, cache, attention=attention).last(len(tokens))


def prefill(
    loaded: Loaded, conversation: Conversation, prompt: Sequence[int]
) -> tuple[mx.array, Conversation]:
    """Run a prompt through the model.

    Returns:
        The final hidden state [d] of the prompt's last token, and the conversation with the
        prompt but for that token: what :func:`mlx_fd.models.generation.generate` goes on from.
    """
    tokens = (*conversation.tokens, *prompt)
    cache, start = copy.deepcopy(conversation.cache), len(conversation.tokens)
    if cache is None:
        cache, start = make_prompt_cache(loaded.model), 0
    if can_be_cut_back(cache, len(tokens)):
        final = _read(loaded, cache, tokens[start:])
        return final, rewind(Conversation(tokens, cache), len(tokens) - 1)
    if tokens[start:-1]:
        _read(loaded, cache, tokens[start:-1])
    before = Conversation(tokens[:-1], copy.deepcopy(cache))
    return _read(loaded, cache, tokens[-1:]), before


def read_alone(loaded: Loaded, cache: Cache, tokens: Sequence[int]) -> None:
    """Let a model read on, one conversation by itself; ``cache`` then holds the tokens, too."""
    for begin in range(0, len(tokens), PREFILL):
        loaded.model(mx.array([[*tokens[begin : begin + PREFILL]]]), cache=cache)
        mx.eval([layer.state for layer in cache])


def _read(loaded: Loaded, cache: Cache, tokens: Sequence[int]) -> mx.array:
    """The final hidden state [d] at the last of some tokens; ``cache`` then holds them."""
    final = loaded.view.forward(mx.array([*tokens])[None], cache).final[0, -1]
    mx.eval(final, [layer.state for layer in cache])
    return final
