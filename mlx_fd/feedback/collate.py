"""Texts side by side: micro-batches of about one length, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlx_fd.losses.teacher import TopK


class PromptAndTarget(Protocol):
    """Tokens before a text, and the tokens of the text."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens before the text, at least one."""
        ...

    @property
    def target(self) -> tuple[int, ...]:
        """Tokens of the text, at least one."""
        ...


def micro_batches(texts: Sequence[PromptAndTarget], size: int) -> list[list[int]]:
    """Indices of texts, ``size`` of about the same length at a time: little of it is padding."""
    order = sorted(range(len(texts)), key=lambda k: len(texts[k].prompt) + len(texts[k].target))
    return [order[i : i + size] for i in range(0, len(order), size)]


def collate_tokens(texts: Sequence[PromptAndTarget]) -> tuple[mx.array, list[range]]:
    """What a model reads to predict every token of some texts.

    Returns:
        Prompt and text without its last token, [B, S], padded with 0 on the right; and of each text
        the positions among S where its tokens are predicted.
    """
    width = max(len(text.prompt) + len(text.target) for text in texts) - 1
    positions = [
        range(len(text.prompt) - 1, len(text.prompt) - 1 + len(text.target)) for text in texts
    ]
    return pad([(*text.prompt, *text.target[:-1]) for text in texts], width), positions


def pad(rows: Sequence[Sequence[int]], width: int) -> mx.array:
    """Rows of whole numbers as one array [B, width], with 0 on the right."""
    return mx.array([[*row, *[0] * (width - len(row))] for row in rows])


def concatenate_targets(parts: Sequence[mx.array | TopK]) -> mx.array | TopK:
    """What a teacher expects of several texts' tokens, in a row: all hidden states or all top k."""
    top_k = [part for part in parts if isinstance(part, TopK)]
    if top_k:
        return TopK(
            values=mx.concatenate([part.values for part in top_k]),
            indices=mx.concatenate([part.indices for part in top_k]),
            log_sum_exp=mx.concatenate([part.log_sum_exp for part in top_k]),
        )
    return mx.concatenate([part for part in parts if isinstance(part, mx.array)])
