"""Divergence of the next-token distributions, from hidden states, without the logits.

Two models' logits for 2,048 tokens over a vocabulary of 151,936 are 2.5 GB in float32, and a dense
graph keeps several such arrays. Here logits exist for a chunk of the tokens at a time, and the
gradient by the student's hidden states is made in the same pass, in closed form, so that nothing of
the vocabulary's size outlives its chunk (the idea is Liger-Kernel's, arXiv 2410.10989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_fd.backend import backend
from mlx_fd.losses.graph import (
    Rows,
    divergence_rows,
    standardized_rows,
    top_k_divergence_rows,
)
from mlx_fd.losses.head import Head, Parameters, linear_head

# Bytes that the logits and what is made of them may take at a time.
MEMORY_BUDGET = 512 * 2**20
# Of logits that stay in a CPU's cache while dozens of operations pass over them.
_CACHE_BYTES = 3 * 2**19


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens at N positions, and with the sum what all others have.

    Attributes:
        values: [N, k], their logits, before the temperature.
        indices: [N, k], their tokens, all different in a row.
        log_sum_exp: [N], of the logits of the whole vocabulary *divided by the temperature*.
    """

    values: mx.array
    indices: mx.array
    log_sum_exp: mx.array


def one_hot(targets: mx.array) -> TopK:
    """A teacher that is sure of each token [N]: the forward divergence is the cross entropy.

    At temperature 1, that is.
    """
    nothing = mx.zeros(targets.shape)
    return TopK(nothing[:, None], targets[:, None], nothing)


def fused_linear_divergence(
    student_hidden: mx.array,
    student_head: nn.Module,
    teacher: mx.array | TopK,
    teacher_head: nn.Module | None,
    mask: mx.array,
    *,
    kind: str,
    temperature: float,
    vocab: int,
    beta: float = 0.5,
    standardize: bool = False,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Sum over the tokens of T^2 times the divergence of the softened distributions.

    ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher), ``jsd`` the
    generalised Jensen-Shannon divergence of :func:`mlx_fd.losses.graph.divergence_rows`. T^2 keeps
    the gradient's size as T changes (Hinton et al., arXiv 1503.02531). With ``standardize`` each
    row of logits is z-scored over the shared vocabulary before it is divided by T (Sun et al.,
    arXiv 2403.01427; population variance).

    With :class:`TopK` the distributions are over its k tokens and, as one more, all the others
    together: a true divergence, never above that of the full distributions.

    Gradients flow into ``student_hidden``, and into the head's weight and bias where they train.
    They are made together with the value: there is nothing to differentiate twice.

    Args:
        student_hidden: [N, d_student], after the final norm, any float type.
        student_head: ``nn.Linear``, ``nn.Embedding`` (a tied head) or the quantised form of one.
        teacher: final hidden states [N, d_teacher], or the teacher's top k.
        teacher_head: like ``student_head``; ``None`` with a :class:`TopK`.
        mask: [N], each token's weight; where it is 0 anything may stand, NaN too.
        kind: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        temperature: T, above 0.
        vocab: V, the real tokens that the models share; the heads' rows beyond are padding.
        beta: the teacher's part in the mixture of ``"jsd"``, between 0 and 1.
        standardize: z-score the rows first.
        chunk: tokens at a time; ``None`` for as many as :data:`MEMORY_BUDGET` bytes allow.

    Returns:
        The weighted sum and the sum of the weights, float32.

    Raises:
        ValueError: an unknown ``kind``, a ``beta`` at or beyond the ends, a head that is missing,
            not linear or narrower than ``vocab``, or standardised top k.
    """
    rows = _row_function(kind, beta, temperature, standardize, isinstance(teacher, TopK))
    weights = mx.stop_gradient(mask.astype(mx.float32))
    ours = linear_head(student_head, vocab)
    if isinstance(teacher, TopK):
        known, theirs = [teacher.values, teacher.indices, teacher.log_sum_exp], None
    else:
        if teacher_head is None:
            raise ValueError("the teacher's hidden states need its head")
        known, theirs = [teacher], linear_head(teacher_head, vocab)
    known = [mx.stop_gradient(values) for values in known]
    widen = ours.widen or (theirs is not None and theirs.widen)
    per_chunk = chunk or chunk_size(len(weights), vocab, widen=widen)

    @mx.custom_function
    def total(hidden: mx.array, trained: Parameters) -> tuple[mx.array, mx.array, Parameters]:
        head = replace(ours, **trained)
        return _in_chunks(hidden, head, known, theirs, weights, rows, per_chunk)

    @total.vjp
    def total_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, Parameters]:
        hidden, trained = primals
        _, by_hidden, by_head = outputs
        return (cotangents[0] * by_hidden).astype(hidden.dtype), {
            name: (cotangents[0] * by_head[name]).astype(value.dtype)
            for name, value in trained.items()
        }

    result: Any = total(student_hidden, ours.parameters())
    return result[0], weights.sum()


def chunk_size(n: int, vocab: int, *, widen: bool) -> int:
    """How many of n tokens to take at a time: all that :data:`MEMORY_BUDGET` allows, equal parts.

    Args:
        n: tokens.
        vocab: V, the width of their logits.
        widen: whether logits are put together from tiles.
    """
    # Two models' logits and the gradient; and the tiles.
    arrays = 4 if widen else 3
    most = max(1, MEMORY_BUDGET // (4 * vocab * arrays))
    return math.ceil(n / math.ceil(n / most))


def _in_chunks(
    hidden: mx.array,
    head: Head,
    known: list[mx.array],
    teacher_head: Head | None,
    weights: mx.array,
    rows: Rows,
    chunk: int,
) -> tuple[mx.array, mx.array, Parameters]:
    """The weighted sum, its gradient by ``hidden``, and by what of the head is learned.

    MLX is lazy, and left alone would hold several chunks at once: each waits for the one before.
    """
    total = mx.array(0.0)
    by_hidden: list[mx.array] = []
    by_head: Parameters = {}
    slope: mx.array | None = None
    for start in range(0, len(weights), chunk):
        part = slice(start, start + chunk)
        weight = weights[part]
        ours, *teacher = [_where(weight != 0, values[part]) for values in (hidden, *known)]
        if by_hidden:
            ours, *teacher = mx.depends([ours, *teacher], [total, by_hidden[-1], *by_head.values()])
        logits = head.logits(ours)
        if logits.dtype == mx.float16:
            # The gradient comes in the logits' type, and float16 has nothing as small.
            logits = logits.astype(mx.float32)
        if teacher_head is not None:
            teacher = [teacher_head.logits(teacher[0])]
        values, slope = _in_cache(rows, [logits, *teacher], slope)
        total = total + (values * weight).sum()
        by_hidden.append(head.input_gradient(slope, hidden.dtype) * weight[:, None])
        now = head.parameter_gradients(slope, ours, weight)
        by_head = {name: value + by_head.get(name, 0) for name, value in now.items()}
    return total, mx.concatenate(by_hidden), by_head


def _where(valid: mx.array, values: mx.array) -> mx.array:
    """Of [n, ...], 0 where not ``valid`` [n]."""
    return mx.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def _in_cache(
    rows: Rows, arrays: list[mx.array], used: mx.array | None
) -> tuple[mx.array, mx.array]:
    """``rows`` of arrays [n, ...]; on a CPU of as many rows at a time as its cache holds.

    There the gradient is written over one that is ``used``, if it has the shape: fresh memory from
    the system costs as much as ten operations.
    """
    n, vocab = arrays[0].shape
    tile = max(1, _CACHE_BYTES // (4 * vocab))
    if n <= tile or not backend().on_cpu:
        return rows(*arrays)
    values: list[mx.array] = []
    slopes = mx.zeros((n, vocab)) if used is None or used.shape != (n, vocab) else used
    for start in range(0, n, tile):
        pieces = [array[start : start + tile] for array in arrays]
        if values:
            pieces = mx.depends(pieces, [values[-1], slopes])
        value, slope = rows(*pieces)
        values.append(value)
        # MLX does this in place, as nothing else needs the array as it was.
        slopes = mx.slice_update(slopes, slope, mx.array([start]), (0,))
    return mx.concatenate(values), slopes


def _row_function(
    kind: str, beta: float, temperature: float, standardize: bool, top_k: bool
) -> Rows:
    betas = {"forward": 0.0, "reverse": 1.0, "jsd": beta}
    if kind not in betas:
        raise ValueError(f'kind must be "forward", "reverse" or "jsd", not {kind!r}')
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, not {beta}")
    if top_k:
        if standardize:
            raise ValueError("k of a teacher's logits do not give the spread of all of them")
        return partial(top_k_divergence_rows, beta=betas[kind], temperature=temperature)
    rows = partial(divergence_rows, beta=betas[kind], temperature=temperature)
    return partial(standardized_rows, rows) if standardize else rows
