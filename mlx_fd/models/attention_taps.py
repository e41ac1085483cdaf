"""The attention distributions of a block, which mlx-lm's fused attention does not give out.

They are computed again from the block's own input, which :meth:`mlx_fd.models.view.View.forward`
keeps: norm, query and key projections (with LoRA and biases, where there are), rotary positions,
grouped queries, causal mask; for the blocks of mlx-lm's ``llama`` and ``qwen2``.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import KVCache

from mlx_fd.errors import UserError

# Stands in for log 0, so that 0 * log 0 is 0: far below any log-probability, and still a number.
LOG_ZERO = -1e30


def check_block(block: nn.Module) -> None:
    """Make sure that :func:`log_attention` can read a block.

    Raises:
        UserError: the block is of another architecture, or attends to a sliding window.
    """
    attention = getattr(block, "self_attn", None)
    if not isinstance(attention, (llama.Attention, qwen2.Attention)):
        raise UserError(
            "the attention loss reads the blocks of llama and qwen2 models, not "
            f"{type(block).__module__}.{type(block).__name__}: leave it out of the losses"
        )
    if getattr(block, "use_sliding", False):
        raise UserError(
            "the attention loss does not read blocks that attend to a sliding window: "
            "leave it out of the losses"
        )


def attention_heads(block: nn.Module) -> int:
    """How many heads a block attends with.

    Raises:
        UserError: as for :func:`check_block`.
    """
    check_block(block)
    return int(block.self_attn.n_heads)


def log_attention(
    block: nn.Module,
    hidden: mx.array,
    *,
    positions: mx.array | None = None,
    cache: KVCache | None = None,
) -> mx.array:
    """Logarithm of a block's attention weights, differentiable.

    Args:
        block: a block of the model, ``view.blocks[i]``.
        hidden: [B, T, d], its input: ``view.forward(tokens).layers[i]``.
        positions: [B, Q], the places in ``hidden`` of the queries that are wanted; ``None``: all T.
        cache: the block's prompt cache after that pass, where there was one: ``hidden`` then holds
            its newest T positions.

    Returns:
        [B, heads, Q, K], float32, K being the T positions or all that the cache holds; keys that a
        query does not see at :data:`LOG_ZERO` or below.

    Raises:
        UserError: as for :func:`check_block`.
    """
    check_block(block)
    attention = block.self_attn
    batch, length, _ = hidden.shape
    states = block.input_layernorm(hidden)

    def split(projected: mx.array, heads: int) -> mx.array:
        return projected.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)

    if cache is None:
        offset = 0
        keys = attention.rope(split(attention.k_proj(states), attention.n_kv_heads))
    else:
        offset = cache.offset - length
        keys = cache.keys[..., : cache.offset, :]
    queries = attention.rope(split(attention.q_proj(states), attention.n_heads), offset=offset)
    if positions is None:
        positions = mx.broadcast_to(mx.arange(length), (batch, length))
    queries = mx.take_along_axis(queries, positions[:, None, :, None], axis=2).astype(mx.float32)

    # Each key head serves a group of neighbouring query heads.
    grouped = queries.reshape(
        batch, attention.n_kv_heads, -1, positions.shape[1], queries.shape[-1]
    )
    scores = (attention.scale * grouped) @ keys[:, :, None].astype(mx.float32).swapaxes(-1, -2)
    scores = scores.reshape(batch, attention.n_heads, positions.shape[1], -1)
    seen = mx.arange(scores.shape[-1]) <= (positions + offset)[:, None, :, None]
    scores = mx.where(seen, scores, LOG_ZERO)
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)
