"""Exponentials on MLX's CPU backend, and what is made of them: softmax, attention, sigmoid.

Built for any x86, MLX calls a function for each number there, 9 ns each: most of what a small
model's attention takes. Here they are polynomials, in operations that a CPU does several numbers at
a time; and attention takes as many queries at a time as its cache has room for their scores, and
under a causal mask no keys that none of them sees. What comes out is MLX's to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127
_INTEGERS = 1.5 * 2.0**_MANTISSA_BITS
_INTEGERS_BITS = (_EXPONENT_BIAS + _MANTISSA_BITS << _MANTISSA_BITS) + (1 << _MANTISSA_BITS - 1)
# Of 2^f for |f| <= 1/2, within 1e-7 of it: the polynomial of least error that is 1 at 0.
_EXP2 = (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715126, 0.0013264727)
_LOG2_E = 1 / math.log(2)
_SMALLEST = -126.0
# Of a softmax's largest power of e a share that float32 does not see beside it; what is smaller
# still would make numbers that a CPU multiplies a hundred times slower.
_UNSEEN = -64.0
# Scores that are made at a time, 1 MB.
_SCORES = 2**18
_MIN_QUERIES = 16
# Of fewer numbers than these MLX's own takes less time than twenty operations.
_FEW = 8192

_FUSED = "scaled_dot_product_attention"
_fused: Any = mx.fast.scaled_dot_product_attention
_sigmoid: Any = mx.sigmoid
_logsumexp: Any = mx.logsumexp


def install() -> None:
    """Put these in the place of MLX's own, for float32; mlx-lm's models then call them."""
    _put(sigmoid, logsumexp, attention)


@contextmanager
def uninstalled() -> Iterator[None]:
    """MLX's own functions again, for a graph that MLX is to describe."""
    before = mx.sigmoid, mx.logsumexp, mx.fast.scaled_dot_product_attention
    _put(_sigmoid, _logsumexp, _fused)
    try:
        yield
    finally:
        _put(*before)


def _put(*functions: Any) -> None:
    parts: dict[str, Any] = vars(mx)
    parts["sigmoid"], parts["logsumexp"], vars(mx.fast)[_FUSED] = functions


def exp2(power: mx.array) -> mx.array:
    """Powers of 2, of float32 numbers in [-126, 127]; exact to 3e-7 of the result.

    2^f times 2^i of the whole and the broken part.
    """
    # In this range a float32's last bit is 1: adding it rounds to an integer, kept in the bits.
    shifted = power + _INTEGERS
    fraction = power - (shifted - _INTEGERS)
    result = fraction * _EXP2[-1] + _EXP2[-2]
    for coefficient in _EXP2[-3::-1]:
        result = result * fraction + coefficient
    exponent = shifted.view(mx.int32) - (_INTEGERS_BITS - _EXPONENT_BIAS)
    return result * (exponent << _MANTISSA_BITS).view(mx.float32)


def exp(rows: mx.array) -> mx.array:
    """Powers of e, of float32 numbers that are at most 0; at least 1e-38."""
    return exp2(mx.maximum(rows * _LOG2_E, _SMALLEST))


@mx.custom_function
def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, float32."""
    rows = (scores - scores.max(axis=-1, keepdims=True)) * _LOG2_E
    powers = exp2(mx.maximum(rows, _UNSEEN))
    return powers * (1 / powers.sum(axis=-1, keepdims=True))


@softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
    product = weights * cotangent
    return product - weights * product.sum(axis=-1, keepdims=True)


@mx.custom_function
def _sigmoid32(x: mx.array) -> mx.array:
    return 1 / (1 + exp2(mx.clip(x * -_LOG2_E, _SMALLEST, -_SMALLEST)))


@_sigmoid32.vjp
def _sigmoid32_vjp(x: mx.array, cotangent: mx.array, value: mx.array) -> mx.array:
    return cotangent * (value * (1 - value))


@mx.custom_function
def _logsumexp32(rows: mx.array) -> mx.array:
    top = rows.max(axis=-1, keepdims=True)
    # Rows of -inf alone have no number to begin from.
    shift = mx.where(mx.isinf(top), 0.0, top)
    return mx.where(mx.isinf(top), top, shift + mx.log(exp(rows - shift).sum(-1, keepdims=True)))


@_logsumexp32.vjp
def _logsumexp32_vjp(rows: mx.array, cotangent: mx.array, value: mx.array) -> mx.array:
    shift = mx.where(mx.isinf(value), 0.0, value)
    return cotangent * exp(mx.minimum(rows - shift, 0.0))


def sigmoid(a: mx.array, **more: Any) -> mx.array:
    """``mx.sigmoid``."""
    own = more or a.dtype != mx.float32 or a.size < _FEW
    values: Any = _sigmoid(a, **more) if own else _sigmoid32(a)
    made: mx.array = values
    return made


def logsumexp(a: mx.array, axis: Any = None, keepdims: bool = False, **more: Any) -> mx.array:
    """``mx.logsumexp``."""
    if a.dtype != mx.float32 or axis not in (-1, a.ndim - 1) or a.size < _FEW or more:
        other: mx.array = _logsumexp(a, axis=axis, keepdims=keepdims, **more)
        return other
    made: Any = _logsumexp32(a)
    sums: mx.array = made if keepdims else made.squeeze(-1)
    return sums


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **more: Any,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``."""
    few = q.size // q.shape[-1] * k.shape[2] < _FEW
    if few or {q.dtype, k.dtype, v.dtype} != {mx.float32} or sinks is not None or more:
        fused: mx.array = _fused(q, k, v, scale=scale, mask=mask, sinks=sinks, **more)
        return fused
    batch, heads, length, _ = q.shape
    groups, places = k.shape[1], k.shape[2]
    queries = (q * scale).reshape(batch, groups, heads // groups, length, -1)
    keys, values = k[:, :, None].swapaxes(-1, -2), v[:, :, None]
    causal = isinstance(mask, str)
    if isinstance(mask, mx.array) and mask.ndim > 2:
        # As the queries: the heads of a group side by side.
        mask = mx.broadcast_to(mask, (*[1] * (4 - mask.ndim), *mask.shape))
        split = (groups, heads // groups) if mask.shape[1] == heads else (mask.shape[1], 1)
        mask = mask.reshape(mask.shape[0], *split, *mask.shape[2:])
    size = max(_MIN_QUERIES, _SCORES // max(batch * heads * places, 1))
    size = math.ceil(length / math.ceil(length / size))
    parts = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        # The last query sees all keys under a causal mask, and each one before it one less.
        seen = places - length + end if causal else places
        scores = queries[..., begin:end, :] @ keys[..., :seen]
        here: Any = mask
        if causal:
            here = mx.arange(places - length + begin, seen)[:, None] >= mx.arange(seen)
        elif isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] == length:
            here = mask[..., begin:end, :]
        if here is not None and here.dtype == mx.bool_:
            # Beside it any score is 0: a sum is what a choice would be, in half the time.
            here = mx.where(here, 0.0, mx.finfo(mx.float32).min)
        if here is not None:
            scores = scores + here
        weights: Any = softmax(scores)
        parts.append(weights @ values[..., :seen, :])
    made = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)
    return made.reshape(batch, heads, length, -1)
