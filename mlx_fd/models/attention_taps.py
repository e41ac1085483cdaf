"""The attention distributions of a model's blocks, which mlx-lm's fused attention does not give.

No architecture is read here. While a model runs, what each of its blocks gives to
``mx.fast.scaled_dot_product_attention`` is kept: queries and keys as they are by then (normed,
turned by their positions, of latents or of a cache), scale and mask. The weights are their softmax.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_fd.errors import UserError

# Stands in for log 0, so that 0 * log 0 is 0: far below any log-probability, and still a number.
LOG_ZERO = -1e30
# Below it a key is one that a query does not see: half precision masks with -65504.
_UNSEEN = -1e4
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Attention:
    """One call of the fused attention.

    Attributes:
        queries: [B, H, T, D].
        keys: [B, H_keys, K, D], each of which serves H / H_keys query heads; the last T of them
            stand where the queries do.
        values: [B, H_keys, K, D_values].
        scale: of their products.
        mask: ``"causal"``, true where a key is seen, or what is added to the products, of a shape
            that broadcasts to [B, H, T, K]; ``None``: all keys are seen.
        sinks: whether each query can give a part of its weight to no key at all.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: bool

    def last(self, count: int) -> Attention:
        """That of the last queries alone."""
        length = self.queries.shape[2]
        mask = self.mask
        if isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] == length:
            mask = mask[..., length - count :, :]
        return replace(self, queries=self.queries[:, :, length - count :], mask=mask)


# What one block calls; that is one attention mostly, or none.
Attentions = tuple[Attention, ...]


@contextmanager
def recorded() -> Iterator[list[Attention]]:
    """Keep what this thread gives to MLX's fused attention."""
    calls: list[Attention] = []
    thread = threading.get_ident()

    def record(fused: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(
            queries: mx.array,
            keys: mx.array,
            values: mx.array,
            *,
            scale: float,
            mask: Any = None,
            sinks: Any = None,
            **more: Any,
        ) -> mx.array:
            if threading.get_ident() == thread:
                calls.append(Attention(queries, keys, values, scale, mask, sinks is not None))
            return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **more)

        return call

    fast: Any = mx.fast
    with _LOCK:
        fused = fast.scaled_dot_product_attention
        fast.scaled_dot_product_attention = record(fused)
        try:
            yield calls
        finally:
            fast.scaled_dot_product_attention = fused


def joined(rows: Sequence[Attentions]) -> Attentions:
    """What a block called for each text of a batch, as for the batch at once."""

    def one(of_rows: Sequence[Attention]) -> Attention:
        first = of_rows[0]
        masks = [row.mask for row in of_rows if isinstance(row.mask, mx.array)]
        return replace(
            first,
            queries=mx.concatenate([row.queries for row in of_rows]),
            keys=mx.concatenate([row.keys for row in of_rows]),
            values=mx.concatenate([row.values for row in of_rows]),
            mask=mx.concatenate(masks) if masks and masks[0].ndim == 4 else first.mask,
        )

    return tuple(one(of_rows) for of_rows in zip(*rows, strict=True))


def only(attentions: Attentions, block: str) -> Attention:
    """The attention of a block that has one.

    Args:
        attentions: what the block called.
        block: what to call it in a message.

    Raises:
        UserError: it has none, several, or one with sinks.
    """
    if len(attentions) == 1 and not attentions[0].sinks:
        return attentions[0]
    if not attentions:
        why = "has no attention, or one that is not MLX's own"
    elif len(attentions) > 1:
        why = "has several attentions"
    else:
        why = "has attention sinks, so that its weights are no distribution over the tokens"
    raise UserError(
        f"the attention loss reads blocks with one softmax attention, as those of llama, mistral, "
        f"qwen3, gemma3 or granite, and {block} {why}: leave it out of the losses, or choose a "
        "model without such blocks"
    )


def log_attention(
    attentions: Attentions, *, positions: mx.array | None = None, keys: int | None = None
) -> mx.array:
    """Logarithm of a block's attention weights, differentiable.

    Args:
        attentions: of the block, ``view.forward(tokens, attention=True).attention[i]``.
        positions: [B, Q], the queries that are wanted of T; ``None``: all.
        keys: S, how many tokens there are up to the last query; ``None``: those that the block has
            keys of. Some let go of what is far back, which then nothing sees.

    Returns:
        [B, heads, Q, S], float32; keys that a query does not see at :data:`LOG_ZERO`.

    Raises:
        UserError: as for :func:`only`.
    """
    attention = only(attentions, "one of these")
    batch, heads, length, width = attention.queries.shape
    groups, places = attention.keys.shape[1], attention.keys.shape[2]
    if positions is None:
        positions = mx.broadcast_to(mx.arange(length), (batch, length))
    rows = positions[:, None, :, None]
    queries = mx.take_along_axis(attention.queries, rows, axis=2).astype(mx.float32)
    # Each key head serves a group of neighbouring query heads.
    grouped = queries.reshape(batch, groups, -1, positions.shape[1], width)
    transposed = attention.keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
    scores = ((attention.scale * grouped) @ transposed).reshape(batch, heads, -1, places)
    if isinstance(attention.mask, str):
        scores = mx.where(mx.arange(places) <= rows + (places - length), scores, LOG_ZERO)
    elif attention.mask is not None:
        full = mx.broadcast_to(attention.mask, (batch, heads, length, places))
        mask = mx.take_along_axis(full, rows, axis=2)
        bare = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, LOG_ZERO) if bare else scores + mask.astype(mx.float32)
    log_weights = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    log_weights = mx.where(log_weights < _UNSEEN, LOG_ZERO, log_weights)
    before = (keys or places) - places
    if before:
        log_weights = mx.pad(
            log_weights, [(0, 0), (0, 0), (0, 0), (before, 0)], constant_values=LOG_ZERO
        )
    return log_weights
