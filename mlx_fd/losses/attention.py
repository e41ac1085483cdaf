"""Attention matching: the student looks where the expert looks.

With a_E and a_S the attention distributions of a pair of heads at query t, over the keys 1 .. t::

    L = mean over layers, heads and queries of KL(a_E || a_S)

the attention transfer of MiniLM (Wang et al., arXiv 2002.10957), which takes the last layer only
and needs equal numbers of heads. Here layers are aligned as in
:func:`mlx_fd.losses.hidden.aligned_layers` (TinyBERT, arXiv 1909.10351, also spreads them evenly),
and heads in one of two ways, which is our addition:

- ``"mean"``: each model's distributions are averaged over its heads first. For models of different
  families, whose heads have no order in common.
- ``"aligned"``: the student's head i of n goes with the expert's head floor(i (m - 1) / (n - 1)) of
  m. For a student cut out of the expert, where heads of the same place are the same.

Grouped-query attention changes nothing: heads are query heads. Both models read the same tokens.
Where the student does not see a key that the expert sees, behind the end of a sliding window, the
expert's distribution is taken over the keys that the student sees: no student could learn the rest.
:mod:`mlx_fd.models.attention_taps` gives the distributions. The published code of the feedback
method has no such loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.models.attention_taps import LOG_ZERO


def attention_matching_rows(
    student_layers: Sequence[mx.array],
    teacher_layers: Sequence[mx.array],
    mask: mx.array,
    *,
    heads: str,
) -> mx.array:
    """Per sample, the sum over queries of the mean KL(teacher || student) of layers and heads.

    Args:
        student_layers: log-attention of each layer, of [B, H_student, Q, K], any float type; keys
            that a query does not see at -inf or :data:`LOG_ZERO`.
        teacher_layers: of [B, H_teacher, Q, K], for the same queries and keys; no gradient flows
            into them. Where there are more or fewer than of the student,
            :func:`~mlx_fd.losses.hidden.aligned_layers` picks.
        mask: [B, Q], 1 (true) where the query counts.
        heads: ``"mean"`` or ``"aligned"``.

    Returns:
        [B], float32.

    Raises:
        ValueError: an unknown ``heads``, no layers, or different queries or keys.
    """
    if heads not in ("mean", "aligned"):
        raise ValueError(f'heads must be "mean" or "aligned", not {heads!r}')
    if not student_layers or not teacher_layers:
        raise ValueError("attention matching needs at least one layer of each model")
    valid = mask.astype(mx.bool_)

    def rows(layer: mx.array) -> mx.array:
        log_p = mx.where(valid[:, None, :, None], layer, 0).astype(mx.float32)
        return mx.maximum(log_p, LOG_ZERO)

    total = mx.zeros(valid.shape)
    picks = aligned_layers(len(student_layers), len(teacher_layers))
    for layer, pick in zip(student_layers, picks, strict=True):
        student, teacher = rows(layer), rows(mx.stop_gradient(teacher_layers[pick]))
        if student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                "the models must see the same queries and keys: the student's attention is "
                f"{student.shape}, the teacher's {teacher.shape}"
            )
        if heads == "mean":
            student, teacher = head_mean(student), head_mean(teacher)
        else:
            teacher = teacher[:, mx.array(aligned_layers(student.shape[1], teacher.shape[1]))]
        teacher = _among_seen(teacher, student > LOG_ZERO / 2)
        total = total + (mx.exp(teacher) * (teacher - student)).sum(axis=-1).mean(axis=1)
    losses = total / len(student_layers)
    return mx.where(valid, losses, 0).sum(axis=1)


def _among_seen(log_p: mx.array, seen: mx.array) -> mx.array:
    """Distributions over keys, of which some are not to be seen; as they are where none is lost."""
    lost = (~seen & (log_p > LOG_ZERO / 2)).any(axis=-1, keepdims=True)
    left = mx.where(seen, log_p, LOG_ZERO)
    return mx.where(lost, left - mx.logsumexp(left, axis=-1, keepdims=True), log_p)


def head_mean(log_p: mx.array) -> mx.array:
    """Logarithm of the mean over heads of exp(log_p): [B, H, Q, K] to [B, 1, Q, K].

    ``heads="mean"`` compares these, so a teacher's may be kept in this form.
    """
    return mx.logsumexp(log_p, axis=1, keepdims=True) - math.log(log_p.shape[1])
