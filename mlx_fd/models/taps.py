"""A forward pass that also gives the hidden states of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class Forward:
    """What one pass over tokens of shape [B, T] gives.

    Attributes:
        layers: the embeddings, then the output of each block: n_layers + 1 arrays [B, T, d].
        final: the last one after the model's final norm [B, T, d]; :func:`head` turns it to logits.
    """

    layers: list[mx.array]
    final: mx.array


class _Tap:
    """Stands in for a block: calls it, and keeps what came out."""

    def __init__(self, block: nn.Module, layers: list[mx.array], recompute: bool):
        self._block = block
        self._call = nn.utils.checkpoint(block) if recompute else block
        self._layers = layers

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if not self._layers:
            self._layers.append(hidden)
        self._layers.append(self._call(hidden, *args, **kwargs))
        return self._layers[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def forward(
    model: nn.Module,
    tokens: mx.array,
    cache: list[Any] | None = None,
    *,
    recompute: bool = False,
) -> Forward:
    """Run an mlx-lm model without its head.

    Args:
        model: an mlx-lm model whose blocks are in ``model.model.layers`` (llama, qwen2, ...).
        tokens: [B, T]; right padding is harmless under the causal mask.
        cache: the prompt cache of what comes before ``tokens``; it is extended in place.
        recompute: keep only the blocks' outputs for the backward pass and compute the rest again.

    Returns:
        The hidden states.
    """
    body = model.model
    blocks = body.layers
    layers: list[mx.array] = []
    body.layers = [_Tap(block, layers, recompute) for block in blocks]
    try:
        final = body(tokens, cache)
    finally:
        body.layers = blocks
    return Forward(layers, final)


def head(model: nn.Module) -> nn.Module:
    """What makes logits of final hidden states: a linear layer, or the embeddings it is tied to."""
    return model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head


def width(model: nn.Module) -> int:
    """The size d of a model's hidden states."""
    return int(model.args.hidden_size)
