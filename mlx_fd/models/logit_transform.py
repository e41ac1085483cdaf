"""How a model makes its logits of final hidden states: a linear head, and what it does after it.

Many families do something to the product: Granite divides by ``logits_scaling``, Cohere multiplies
by ``logit_scale``, MiniCPM scales the hidden states, Gemma 2 and 4 bound the logits by a soft cap.
Everything that turns hidden states into distributions must do the same, or it is about another
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
from mlx import nn


@dataclass(frozen=True)
class LogitTransform:
    """What becomes of a linear head's product: logits = cap * tanh(scale * raw / cap).

    Attributes:
        scale: what ``raw`` (bias included) is multiplied by; finite, not 0.
        soft_cap: above 0, what no logit's size exceeds (Gemma 2, arXiv 2408.00118, section 2);
            ``None``: logits = scale * raw.

    Raises:
        ValueError: the scale is 0 or not finite, or the cap is not a number above 0.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"the scale of logits must be finite and not 0, not {self.scale}")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(f"a soft cap of logits must be above 0, not {self.soft_cap}")

    @property
    def is_identity(self) -> bool:
        """Whether the logits are the head's product as it is."""
        return self.scale == 1 and self.soft_cap is None

    def apply(self, raw: mx.array) -> mx.array:
        """The logits, float32; ``raw`` itself where nothing is done to it.

        Args:
            raw: the head's product, of any shape and float type.
        """
        if self.is_identity:
            return raw
        scaled = raw.astype(mx.float32) * self.scale
        if self.soft_cap is None:
            return scaled
        return mx.tanh(scaled * (1 / self.soft_cap)) * self.soft_cap

    def raw_gradient(self, grad: mx.array, logits: mx.array) -> mx.array:
        """The gradient by ``raw``, from that by the logits.

        Args:
            grad: by the logits, of any shape.
            logits: what :meth:`apply` gave, of the same shape.
        """
        if self.is_identity:
            return grad
        if self.soft_cap is None:
            return grad * self.scale
        share = logits * (1 / self.soft_cap)
        # 1 - tanh^2 as a product: next to the cap a difference of squares keeps fewer digits.
        return grad * (self.scale * (1 - share) * (1 + share))


@dataclass(frozen=True)
class LinearLogits:
    """Logits of a linear head.

    Attributes:
        module: the head, ``nn.Linear``, ``nn.Embedding`` (tied) or the quantised form of one.
        transform: what the model does to its product.
    """

    module: nn.Module
    transform: LogitTransform = LogitTransform()


@dataclass(frozen=True)
class DenseLogits:
    """Logits that only the model itself can make; nothing of its head is learned.

    Attributes:
        call: final hidden states [n, d] to logits [n, ``rows``], as the model makes them.
        rows: how many logits it makes of each.
    """

    call: Callable[[mx.array], mx.array]
    rows: int


# Of a bare module the product is the logits.
LogitSource: TypeAlias = nn.Module | LinearLogits | DenseLogits
