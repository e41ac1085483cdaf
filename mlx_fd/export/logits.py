"""Teacher-forced logits of an mlx-lm model, and log-probabilities from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mlx import nn

Float64 = NDArray[np.float64]


def next_token_logits(
    model: nn.Module, tokens: Sequence[int], begin: int, vocab: int
) -> NDArray[np.float32]:
    """Logits [len(tokens) - 1 - begin, vocab]: row i predicts ``tokens[begin + i + 1]``.

    Args:
        model: an mlx-lm model of any architecture.
        tokens: what it reads.
        begin: the first position whose prediction is wanted; before it only the cache is computed.
        vocab: rows of the head that are tokens; the rest is padding.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    if begin:
        model(mx.array([*tokens[:begin]])[None], cache=cache)
        # The logits of these positions are never computed: only the cache is asked for.
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([*tokens[begin:-1]])[None], cache=cache)
    return np.array(logits[0, :, :vocab].astype(mx.float32))


def log_softmax(logits: NDArray[np.float32]) -> Float64:
    """Log-probabilities over the last axis, in float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values
