"""What makes a model's logits of its head's product, found by trying: a scale, a soft cap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_fd.models.logit_transform import LogitTransform

# Largest logits at which a head is tried: a soft cap of up to 100 shows at the last of them, and
# one that does not would change no logit of real size. Half precision holds 512 and its sums.
_SIZES = (0.5, 4.0, 32.0, 512.0)
# A cap is taken to be reached where the product is this many times as large as the logits.
_SATURATED = 4.0
# Relative to the largest logit: what rounding makes of a product, a scale and a tanh.
ROUNDING = {mx.float32: 1e-3, mx.float16: 0.02, mx.bfloat16: 0.02}


def fit(
    logits: Callable[[mx.array], mx.array],
    product: Callable[[mx.array], mx.array],
    width: int,
    dtype: mx.Dtype,
) -> LogitTransform | None:
    """What makes logits of a head's product, if a scale and a soft cap do.

    Args:
        logits: of hidden states [n, d], by the model.
        product: of hidden states [n, d], by the head.
        width: d.
        dtype: of the model's hidden states.
    """
    # Keys of its own: whoever loads a model draws as if nothing had been drawn here.
    states = mx.random.normal((2, width), key=mx.random.key(0))

    def at(size: float) -> tuple[mx.array, mx.array]:
        hidden = (states * size).astype(dtype)
        return logits(hidden).astype(mx.float32), product(hidden).astype(mx.float32)

    def largest(array: mx.array) -> float:
        size: Any = mx.abs(array).max().item()
        return float(size)

    # The size of hidden states at which the product, as the model scales it, is near the smallest:
    # there a cap bends nothing, and the logits tell the scale.
    unit = 1.0
    for _ in range(3):
        size = largest(at(unit)[0])
        if not math.isfinite(size) or size == 0:
            return None
        unit *= _SIZES[0] / size
    small, raw = at(unit)
    scale = _slope(raw, small)
    if not math.isfinite(scale) or scale == 0:
        return None
    rounding = ROUNDING.get(dtype, ROUNDING[mx.float32])
    top, raw_top = at(unit * _SIZES[-1] / _SIZES[0])
    cap = None
    if largest(top) * _SATURATED < abs(scale) * largest(raw_top):
        cap = _shortest(largest(top), rounding / 4)
        share = mx.clip(small / cap, -0.999, 0.999)
        scale = _slope(raw, cap * mx.arctanh(share))
    # Sums over all rows: rounding cancels in them.
    transform = LogitTransform(_shortest(scale, 1e-5 if dtype == mx.float32 else 1e-3), cap)
    for size in _SIZES:
        made, raw = at(unit * size / _SIZES[0])
        error = largest(made - transform.apply(raw))
        if not error <= rounding * largest(made):
            return None
    return transform


def _slope(raw: mx.array, logits: mx.array) -> float:
    """The factor from one array to another, by least squares."""
    ratio: Any = ((raw * logits).sum() / (raw * raw).sum()).item()
    return float(ratio)


def _shortest(value: float, rounding: float) -> float:
    """The number with the fewest digits, or one over it, within a relative error of a value."""
    for digits in range(1, 9):
        for candidate in (float(f"{value:.{digits}g}"), 1 / float(f"{1 / value:.{digits}g}")):
            if abs(candidate - value) <= rounding * abs(value):
                return candidate
    return value
