"""Divergence of the next-token distributions, from hidden states, without the logits.

Two models' logits for 2,048 tokens over a vocabulary of 151,936 are 2.5 GB in float32, and a dense
graph keeps several such arrays. Here logits exist for a chunk of the tokens at a time, and the
gradient by the student's hidden states is made in the same pass, in closed form, so that nothing of
the vocabulary's size outlives its chunk (the idea is Liger-Kernel's, arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_fd.losses import graph, kernels
from mlx_fd.losses.chunks import chunk_size
from mlx_fd.losses.graph import Rows
from mlx_fd.losses.head import DenseHead, Head, Parameters, head_rows, logit_head
from mlx_fd.losses.teacher import TopK, one_hot
from mlx_fd.models.backend import backend
from mlx_fd.models.logit_transform import LogitSource, LogitTransform

# Of logits that stay in a CPU's cache while dozens of operations pass over them.
_CACHE_BYTES = 3 * 2**19


@dataclass(frozen=True)
class Target:
    """What the student's distributions at N positions are to be like.

    :meth:`tokens` and :meth:`teacher` make the usual ones; leading dimensions are flattened there,
    so that hidden states [B, T, d] need no reshaping.

    Attributes:
        outputs: of the teacher: final hidden states [N, d_teacher], or its top k.
        head: the teacher's, like the student's; ``None`` with a :class:`TopK`.
        weights: [N], what each token counts in the sum.
        kind: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        temperature: T, above 0.
        vocab: V, the real tokens that the models share; the heads' rows beyond are padding.
            ``None``: as many as each head has that takes part.
        beta: the teacher's part in the mixture of ``"jsd"``, between 0 and 1.
        standardize: z-score the rows first.
        mask: [N], 1 (true) where there is a token at all; elsewhere anything may stand, NaN too.
            ``None``: everywhere.
        tail: of a :class:`TopK`: whether all other tokens take part, as one more outcome.
        clip: the most that one token of the vocabulary may add to the divergence, before T^2.
    """

    outputs: mx.array | TopK
    head: LogitSource | None
    weights: mx.array
    kind: str
    temperature: float
    vocab: int | None
    beta: float = 0.5
    standardize: bool = False
    mask: mx.array | None = None
    tail: bool = True
    clip: float = math.inf

    @classmethod
    def tokens(
        cls, token_ids: mx.array, *, mask: mx.array | None = None, vocab: int | None = None
    ) -> Target:
        """The tokens themselves: the divergence is the cross entropy.

        Args:
            token_ids: [...], integers below ``vocab``; where negative (the -100 of other
                libraries), there is no token.
            mask: [...], each token's weight, 0 (false) to leave it out; ``None``: 1.
            vocab: V; ``None``: all rows of the student's head.
        """
        flat = token_ids.reshape(-1)
        weights = mx.ones(flat.shape) if mask is None else mask.reshape(-1).astype(mx.float32)
        weights = mx.where(flat >= 0, weights, 0)
        return cls(one_hot(flat), None, weights, "forward", 1.0, vocab, mask=weights != 0)

    @classmethod
    def teacher(
        cls,
        outputs: mx.array | TopK,
        head: LogitSource | None = None,
        *,
        kind: str = "forward",
        temperature: float = 1.0,
        mask: mx.array | None = None,
        vocab: int | None = None,
        **options: Any,
    ) -> Target:
        """Another model's distributions.

        Args:
            outputs: its hidden states [..., d_teacher] after the final norm, or its top k.
            head: what makes its logits, as :func:`~mlx_fd.losses.head.logit_head` takes it;
                ``None`` with a :class:`TopK`.
            kind: ``"forward"`` is KL(teacher || student), ``"reverse"`` KL(student || teacher),
                ``"jsd"`` the generalised Jensen-Shannon divergence.
            temperature: T, above 0; the divergence is multiplied by T^2.
            mask: [...], each token's weight, 0 (false) to leave it out; where it is 0 anything may
                stand, NaN too. ``None``: 1.
            vocab: V, the real tokens that the models share; ``None``: the rows that both heads
                have.
            **options: further attributes: ``beta``, ``standardize``, ``tail``, ``clip``.
        """
        if isinstance(outputs, TopK):
            count = len(outputs.values)
        else:
            outputs = outputs.reshape(-1, outputs.shape[-1])
            count = len(outputs)
        if mask is None:
            weights, valid = mx.ones((count,)), None
        else:
            weights = mask.reshape(-1).astype(mx.float32)
            valid = weights != 0
        return cls(outputs, head, weights, kind, temperature, vocab, mask=valid, **options)


def fused_linear_divergence(
    student_hidden: mx.array,
    student_head: LogitSource,
    target: Target,
    *,
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
        student_hidden: [..., d_student], after the final norm, any float type.
        student_head: as :func:`~mlx_fd.losses.head.logit_head` takes it.
        target: what the distributions are to be like, at as many positions.
        chunk: tokens at a time; ``None`` for as many as :data:`LOGIT_BUDGET` bytes allow.

    Returns:
        The weighted sum and the sum of the weights, float32; their quotient is the mean.

    Raises:
        ValueError: an unknown ``kind``, a ``beta`` at or beyond the ends, a head that is missing,
            not linear or narrower than ``vocab``, standardised top k, or a target for another
            number of positions.
    """
    total, _ = fused_linear_divergences(student_hidden, student_head, [target], chunk=chunk)
    return total, mx.stop_gradient(target.weights.astype(mx.float32)).sum()


def fused_linear_divergences(
    student_hidden: mx.array,
    student_head: LogitSource,
    targets: Sequence[Target],
    *,
    chunk: int | None = None,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array]:
    """Several divergences of the same tokens, for which the student's logits are made once.

    Args:
        student_hidden: [..., d_student], after the final norm, any float type; N positions.
        student_head: as :func:`~mlx_fd.losses.head.logit_head` takes it.
        targets: at least one; :func:`fused_linear_divergence` says what each adds.
        chunk: tokens at a time; ``None`` for as many as :data:`LOGIT_BUDGET` bytes allow.
        differentiable: whether the gradient is made; where only the value is wanted, it saves a
            product.

    Returns:
        The sum over targets and tokens of weight times T^2 times divergence, float32; and T^2
        times each divergence [N, targets], float32, through which no gradient flows.

    Raises:
        ValueError: as :func:`fused_linear_divergence`.
    """
    student_hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    for target in targets:
        if len(target.weights) != len(student_hidden):
            raise ValueError(
                f"{len(student_hidden)} hidden states, but a target for {len(target.weights)} "
                "tokens"
            )
    vocabs = [_vocab(target, student_head) for target in targets]
    student = logit_head(student_head, max(vocabs))
    plans = [
        _Plan(target, vocab, student.transform)
        for target, vocab in zip(targets, vocabs, strict=True)
    ]
    heads = [student, *(plan.head for plan in plans if plan.head is not None)]
    # The student's logits, their gradient, and the teacher's; sums of gradients; tiles, of which
    # MLX makes many ahead, and transformed logits; and what operations that are no kernel make on
    # their way, where not a few rows at a time.
    arrays = 1 + len(heads) + (len(plans) > 1) + max(head.extra_arrays for head in heads)
    arrays += 0 if backend().on_cpu else 2
    per_chunk = chunk or chunk_size(len(student_hidden), max(vocabs), arrays)
    if not differentiable:
        result, values, _, _ = _in_chunks(student_hidden, student, plans, per_chunk, backward=False)
        return mx.stop_gradient(result), mx.stop_gradient(values)

    @mx.custom_function
    def total(
        hidden: mx.array, trained: Parameters
    ) -> tuple[mx.array, mx.array, mx.array, Parameters]:
        return _in_chunks(hidden, replace(student, **trained), plans, per_chunk, backward=True)

    @total.vjp
    def total_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, Parameters]:
        hidden, trained = primals
        _, _, grad_hidden, grad_head = outputs
        return (cotangents[0] * grad_hidden).astype(hidden.dtype), {
            name: (cotangents[0] * grad_head[name]).astype(value.dtype)
            for name, value in trained.items()
        }

    made: Any = total(student_hidden, student.parameters())
    return made[0], mx.stop_gradient(made[1])


def _vocab(target: Target, student_head: LogitSource) -> int:
    """A target's vocabulary; where it names none, the rows of the heads that take part."""
    if target.vocab is not None:
        return target.vocab
    return min(head_rows(head) for head in (student_head, target.head) if head is not None)


class _Plan:
    """A target made ready: its row function, and what that reads, token by token.

    Attributes:
        rows: of the student's product [n, V] and what is known of the teacher.
        known: arrays [N, ...].
        head: makes the teacher's product of the only one of them, where there is one.
        weights: [N], float32.
        mask: [N], or ``None``.
        vocab: V.
    """

    def __init__(self, target: Target, vocab: int, student: LogitTransform):
        self.vocab = vocab
        self.weights = mx.stop_gradient(target.weights.astype(mx.float32))
        self.mask = None if target.mask is None else target.mask.astype(mx.bool_)
        self.head: Head | DenseHead | None = None
        outputs = target.outputs
        if isinstance(outputs, TopK):
            known = [outputs.values, outputs.indices, outputs.log_sum_exp]
        elif target.head is None:
            raise ValueError("the teacher's hidden states need its head")
        else:
            known, self.head = [outputs], logit_head(target.head, vocab)
        self.known = [mx.stop_gradient(values) for values in known]
        self.rows = _row_function(target, student, self.head.transform if self.head else None)

    def reads(self, part: slice) -> list[mx.array]:
        """What is known of some tokens, 0 where there are none."""
        return [_where(self.mask, array, part) for array in self.known]


def _in_chunks(
    hidden: mx.array, head: Head | DenseHead, plans: list[_Plan], chunk: int, *, backward: bool
) -> tuple[mx.array, mx.array, mx.array, Parameters]:
    """The weighted sum, its terms, its gradient by ``hidden``, and by what of the head is learned.

    MLX is lazy, and left alone would hold several chunks at once: each waits for the one before.
    """
    n = len(hidden)
    total = mx.array(0.0)
    values: list[mx.array] = []
    grad_hidden: list[mx.array] = []
    grad_head: Parameters = {}
    # What the chunk before has written, which this one may write over.
    grad: mx.array | None = None
    logits: mx.array | None = None
    teacher: list[Any] = [None] * len(plans)
    rows = plans[0].rows if len(plans) == 1 else partial(_summed_rows, plans)
    masks = [plan.mask for plan in plans if plan.mask is not None]
    mask = mx.stack(masks).any(axis=0) if len(masks) == len(plans) else None
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        weights = mx.stack([plan.weights[part] for plan in plans], axis=-1)
        student = _where(mask, hidden, part)
        known = [array for plan in plans for array in plan.reads(part)]
        if start + chunk > n and start > 0:
            weights, student, *known = [
                _padded(array, chunk) for array in (weights, student, *known)
            ]
        if values:
            done = [total, values[-1], *grad_hidden[-1:], *grad_head.values()]
            student, *known = mx.depends([student, *known], done)
        logits = head.product(student, logits)
        if logits.dtype == mx.float16:
            # The gradient comes in the logits' type, and float16 has nothing as small.
            logits = logits.astype(mx.float32)
        arrays, counts = [logits], weights[:, 0]
        if len(plans) > 1:
            # A type as narrow as float16 keeps nothing of a gradient with small weights: they are
            # shares of the largest of a token here, and that is multiplied with in the end.
            counts = mx.abs(weights).max(axis=-1)
            arrays.append(weights / mx.where(counts == 0, 1, counts)[:, None])
        for place, plan in enumerate(plans):
            mine, known = known[: len(plan.known)], known[len(plan.known) :]
            if plan.head is not None:
                teacher[place] = plan.head.product(mine[0], teacher[place])
                mine = [teacher[place]]
            arrays += mine
        found, grad = _in_cache(rows, arrays, grad)
        found = found.reshape(-1, len(plans))
        total = total + (found * weights).sum()
        values.append(found)
        if backward:
            grad_hidden.append(head.input_gradient(grad, student) * counts[:, None])
            now = head.parameter_gradients(grad, student, counts)
            grad_head = {name: value + grad_head.get(name, 0) for name, value in now.items()}
    every = mx.concatenate(values)[:n]
    return total, every, mx.concatenate(grad_hidden)[:n] if backward else every, grad_head


def _padded(array: mx.array, size: int) -> mx.array:
    """[n, ...] with rows of 0 up to ``size``: all chunks have one shape, and write over one."""
    return mx.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)])


def _summed_rows(
    plans: list[_Plan], logits: mx.array, shares: mx.array, *known: mx.array
) -> tuple[mx.array, mx.array]:
    """Each plan's values [n, plans], and the sum of their gradients times ``shares`` [n, plans]."""
    values: list[mx.array] = []
    total: Any = 0
    for place, plan in enumerate(plans):
        count = len(plan.known)
        value, grad = plan.rows(logits[:, : plan.vocab], *known[:count])
        known = known[count:]
        grad = shares[:, place : place + 1] * grad
        total = total + mx.pad(grad, [(0, 0), (0, logits.shape[1] - plan.vocab)])
        values.append(value)
    return mx.stack(values, axis=-1), total.astype(logits.dtype)


def _where(mask: mx.array | None, array: mx.array, part: slice) -> mx.array:
    """A part of [N, ...], 0 where not ``mask`` [N]."""
    if mask is None:
        return array[part]
    return mx.where(mask[part].reshape(-1, *[1] * (array.ndim - 1)), array[part], 0)


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
    grads = mx.zeros((n, vocab)) if used is None or used.shape != (n, vocab) else used
    for start in range(0, n, tile):
        pieces = [array[start : start + tile] for array in arrays]
        if values:
            pieces = mx.depends(pieces, [values[-1], grads])
        value, grad = rows(*pieces)
        values.append(value)
        # MLX does this in place, as nothing else needs the array as it was.
        grads = mx.slice_update(grads, grad, mx.array([start]), (0,))
    return mx.concatenate(values), grads


def _row_function(target: Target, student: LogitTransform, teacher: LogitTransform | None) -> Rows:
    """Of the models' products: what each does to its own is done by the rows.

    Args:
        target: the divergence and its options.
        student: what the student does to its product.
        teacher: what the teacher does; ``None`` where its logits are known as they are.
    """
    betas = {"forward": 0.0, "reverse": 1.0, "jsd": target.beta}
    if target.kind not in betas:
        raise ValueError(f'kind must be "forward", "reverse" or "jsd", not {target.kind!r}')
    if target.kind == "jsd" and not 0 < target.beta < 1:
        raise ValueError(f"beta must be between 0 and 1, not {target.beta}")
    beta, temperature = betas[target.kind], target.temperature
    if isinstance(target.outputs, TopK):
        if target.standardize:
            raise ValueError("k of a teacher's logits do not give the spread of all of them")
        top_k = partial(
            graph.top_k_divergence_rows,
            beta=beta,
            temperature=temperature,
            tail=target.tail,
            clip=target.clip,
        )
        return partial(graph.transformed_rows, top_k, student, None)
    assert teacher is not None
    if math.isfinite(target.clip):
        rows = partial(
            graph.clipped_divergence_rows, beta=beta, temperature=temperature, clip=target.clip
        )
    else:
        on = kernels.chosen()
        rows = partial(kernels.divergence_rows, beta=beta, temperature=temperature, on=on)
        if not target.standardize:
            return partial(rows, transforms=(student, teacher))
    if target.standardize:
        rows = partial(graph.standardized_rows, rows)
    return partial(graph.transformed_rows, rows, student, teacher)
