"""Other endings of texts that a model has just read, without reading their beginnings again.

What attention keeps of a token depends on what stands before it alone. So where two texts begin
alike, the keys and values of the first one's beginning serve the second, in the same pass over a
batch of ragged texts: a mask hides what is the first one's only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_fd.models.view import View

# What may differ is the order of sums; of half precision it is too much.
_ROUNDING = 1e-3
_LENGTH, _ALIKE = 12, (7, 4)


class Kept(KVCache):
    """Takes a block's keys and values [B, heads, S, D] as they come, differentiable."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep what a block made of the texts, once."""
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


class _Onward:
    """The beginnings of texts, for one block: as a cache of mlx-lm's that each text has a part of.

    Attributes:
        keys: [K, heads, S, D], of which each text sees the first ones.
        values: likewise.
        lengths: [K], how many.
        offset: where each text's next token stands.
    """

    def __init__(self, kept: Kept, rows: mx.array, lengths: mx.array, most: int):
        self.keys, self.values = kept.keys[rows, :, :most], kept.values[rows, :, :most]
        self.offset = self.lengths = lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.offset = self.offset + keys.shape[2]
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """What each of ``count`` tokens sees: [K, 1, count, S + count]."""
        before = mx.broadcast_to(
            mx.arange(self.keys.shape[2]), (len(self.lengths), self.keys.shape[2])
        )
        now = self.lengths[:, None] + mx.arange(count)
        is_there = before < self.lengths[:, None]
        places = mx.concatenate([before, now], axis=1)[:, None]
        is_there = mx.concatenate([is_there, mx.ones(now.shape, mx.bool_)], axis=1)[:, None]
        queries = now[:, :, None]
        sees = is_there & (places <= queries)
        if window_size is not None:
            sees = sees & (queries < places + window_size)
        return sees[:, None]


def keeping(view: View) -> list[Any]:
    """Caches for a pass over a batch whose beginnings are to be gone on from."""
    return [Kept() for _ in make_prompt_cache(view.model)]


def go_on(
    view: View, kept: list[Kept], rows: mx.array, lengths: mx.array, tokens: mx.array
) -> mx.array:
    """Final hidden states [K, L, d] of texts that begin as texts of a batch do.

    Args:
        view: of a model that :func:`goes_on`.
        kept: of :func:`keeping`, after the pass over the batch.
        rows: [K], the batch's text that each one begins as.
        lengths: [K], with how many of its tokens.
        tokens: [K, L], what comes then, padded on the right.
    """
    most: Any = lengths.max().item()
    caches: list[Any] = [_Onward(layer, rows, lengths, most) for layer in kept]
    return view.forward(tokens, caches).final


def goes_on(view: View) -> bool:
    """Whether a model gives texts the hidden states that it gives them when it reads all of them.

    Not where it keeps anything but keys and values, such as the state of a recurrence or a window;
    tried on a batch of two.
    """
    cache = make_prompt_cache(view.model)
    if view.needs_cache or not view.batched or any(type(layer) is not KVCache for layer in cache):
        return False
    first, tails = (
        mx.array([[(step * k + 11 * row) % view.rows for k in range(_LENGTH)] for row in (1, 2)])
        for step in (37, 31)
    )
    try:
        kept = keeping(view)
        view.forward(first, kept)
        made = go_on(view, kept, mx.array([0, 1]), mx.array(_ALIKE), tails)
        return all(
            _close(
                made[row],
                view.forward(mx.concatenate([first[row, :alike], tails[row]])[None]).final[
                    0, alike:
                ],
            )
            for row, alike in enumerate(_ALIKE)
        )
    except Exception:  # whatever a model's own code does with a cache that is no mlx-lm's
        return False


def _close(made: mx.array, whole: mx.array) -> bool:
    made, whole = made.astype(mx.float32), whole.astype(mx.float32)
    return bool((mx.linalg.norm(made - whole) <= _ROUNDING * mx.linalg.norm(whole)).item())
