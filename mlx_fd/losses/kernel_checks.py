"""The row functions on random input, against float64 NumPy: ``mlx-fd doctor --kernels``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_fd.models.logit_transform import LogitTransform

Array = NDArray[np.float64]

_MIN_SQUARED_NORM = 1e-12
# Largest error relative to an output's largest number: the type's rounding, with room to spare.
_LIMITS = {mx.float32: 1e-5, mx.bfloat16: 1e-2, mx.float16: 2e-3}
# Of indices: less than a wrong one makes.
_EXACT = 1e-9
# Odd, and not much more than a threadgroup's threads.
_ROWS, _VOCAB, _WIDTH, _POSITIONS, _K = 3, 1003, 321, 5, 20
# Tight caps: of logits of about 3, some come near them.
_TRANSFORMS = (LogitTransform(2.0, 10.0), LogitTransform(0.5, 5.0))


class RowFunctions(NamedTuple):
    """What is checked; each takes ``on`` by keyword (:mod:`mlx_fd.losses.kernels`)."""

    divergence: Callable[..., Any]
    alignment: Callable[..., Any]
    top_k: Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """How far a row function is from its float64 reference.

    Attributes:
        on: ``"graph"``, ``"metal"`` or ``"cuda"``.
        what: the function and its input.
        error: the largest, relative to the largest number in the output; NaN where it gave NaN,
            and where it could not run.
        limit: the most that it may be.
        failure: why it could not run, or ``""``.
    """

    on: str
    what: str
    error: float
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def divergence_reference(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    beta: float,
    temperature: float,
    transforms: Sequence[LogitTransform] = (),
) -> tuple[Array, Array]:
    """:func:`mlx_fd.losses.kernels.divergence_rows` in float64."""
    rows = [np.asarray(logits, np.float64) for logits in (student, teacher)]
    slopes: Array | float = 1.0
    if transforms:
        (rows[0], slopes), (rows[1], _) = map(_transformed, rows, transforms)
    log_q, log_p = (_log_softmax(logits / temperature) for logits in rows)
    q, p = np.exp(log_q), np.exp(log_p)

    def kl(weights: Array, log_ratio: Array) -> Array:
        return np.asarray(np.where(weights > 0, weights * log_ratio, 0).sum(axis=-1))

    # inf - inf is where neither has probability.
    with np.errstate(invalid="ignore", divide="ignore"):
        if beta == 0:
            value, grad = kl(p, log_p - log_q), q - p
        elif beta == 1:
            value = kl(q, log_q - log_p)
            grad = np.where(q > 0, q * (log_q - log_p - value[:, None]), 0)
        else:
            # Through logarithms: a mixture of probabilities that underflow is no 0.
            middle = np.logaddexp(log_p + np.log(beta), log_q + np.log(1 - beta))
            of_student = kl(q, log_q - middle)
            value = beta * kl(p, log_p - middle) + (1 - beta) * of_student
            grad = np.where(q > 0, (1 - beta) * q * (log_q - middle - of_student[:, None]), 0)
    return temperature**2 * value, temperature * grad * slopes


def _transformed(raw: Array, transform: LogitTransform) -> tuple[Array, Array]:
    """Logits, and their derivatives by the product that they are made of."""
    scaled = transform.scale * raw
    if transform.soft_cap is None:
        return scaled, np.full_like(raw, transform.scale)
    cap = transform.soft_cap
    # cosh overflows to inf where the cap is reached, and the derivative is 0.
    with np.errstate(over="ignore"):
        return cap * np.tanh(scaled / cap), transform.scale / np.cosh(scaled / cap) ** 2


def alignment_reference(
    student: ArrayLike, teacher: ArrayLike, mask: ArrayLike
) -> tuple[Array, Array]:
    """:func:`mlx_fd.losses.kernels.alignment_rows` in float64."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    value, gradient = np.zeros(len(student)), np.zeros_like(student)
    for sample, chosen in enumerate(np.asarray(mask, bool)):
        places = np.flatnonzero(chosen)
        groups = [places] if teacher.ndim == 2 else [np.array([place]) for place in places]
        for group in groups if places.size else []:
            student_rows = student[sample, group].mean(axis=0)
            teacher_rows = teacher[sample] if teacher.ndim == 2 else teacher[sample, group[0]]
            norm, other = (
                np.sqrt(max(x @ x, _MIN_SQUARED_NORM)) for x in (student_rows, teacher_rows)
            )
            cosine = student_rows @ teacher_rows / (norm * other)
            along = (
                cosine * student_rows / norm
                if student_rows @ student_rows > _MIN_SQUARED_NORM
                else 0
            )
            value[sample] += (1 - cosine) / len(groups)
            gradient[sample, group] = (along - teacher_rows / other) / norm / places.size
    return value, gradient


def top_k_reference(logits: ArrayLike, k: int) -> tuple[Array, Array, Array]:
    """:func:`mlx_fd.losses.kernels.top_k_rows` in float64."""
    rows = np.asarray(logits, np.float64)
    indices = np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    log_sum_exp = rows[:, 0] - _log_softmax(rows)[:, 0]
    return np.take_along_axis(rows, indices, axis=-1), indices.astype(np.float64), log_sum_exp


def run_checks(
    rows: RowFunctions, on: str, dtypes: Sequence[mx.Dtype] = tuple(_LIMITS)
) -> list[Check]:
    """Every row function on small random input.

    Args:
        rows: the functions.
        on: one of :func:`mlx_fd.losses.kernels.runnable`.
        dtypes: of the logits and states; float32, bfloat16 and float16 are known.
    """
    return [_check(on, case) for case in _cases(rows, dtypes)]


@dataclass(frozen=True)
class _Case:
    what: str
    rows: Callable[..., tuple[mx.array, ...]]
    reference: Callable[..., tuple[Array, ...]]
    arrays: Sequence[mx.array]
    options: Mapping[str, Any]


def _cases(rows: RowFunctions, dtypes: Sequence[mx.Dtype]) -> Iterator[_Case]:
    random = np.random.default_rng(0)

    def some(*shape: int) -> mx.array:
        return mx.array((random.standard_normal(shape) * 3).astype(np.float32))

    for dtype in dtypes:
        name = str(dtype).rpartition(".")[-1]
        pairs = {"": [some(_ROWS, _VOCAB).astype(dtype) for _ in range(2)]}
        if dtype == mx.float32:
            # The same for both models: the top tokens near 1e4, the others far below.
            far = mx.where(mx.array(random.random((_ROWS, _VOCAB)) < 0.5), 1e4, -1e4)
            pairs[" near 1e4"] = [logits + far for logits in pairs[""]]
        for near, pair in pairs.items():
            for kind, beta in (("forward KL", 0.0), ("reverse KL", 1.0), ("JSD", 0.3)):
                what = f"{kind}, {name}{near}"
                options = {"beta": beta, "temperature": 2.0}
                yield _Case(what, rows.divergence, divergence_reference, pair, options)
        what = f"JSD of scaled and capped logits, {name}"
        capped = {"beta": 0.3, "temperature": 2.0, "transforms": _TRANSFORMS}
        yield _Case(what, rows.divergence, divergence_reference, pairs[""], capped)
        hidden = some(_ROWS, _POSITIONS, _WIDTH).astype(dtype)
        each = some(_ROWS, _POSITIONS, _WIDTH).astype(dtype)
        mask = mx.array(random.random((_ROWS, _POSITIONS)) < 0.6)
        mask[0] = False
        for kind, teacher in (("pooled", some(_ROWS, _WIDTH)), ("per token", each)):
            what = f"alignment, {kind}, {name}"
            arrays = [hidden, teacher, mask]
            yield _Case(what, rows.alignment, alignment_reference, arrays, {})
        logits = some(_ROWS, _VOCAB).astype(dtype)
        yield _Case(f"top k, {name}", rows.top_k, top_k_reference, [logits], {"k": _K})


def _check(on: str, case: _Case) -> Check:
    try:
        outputs = case.rows(*case.arrays, **case.options, on=on)
        mx.eval(outputs)
    except (RuntimeError, ValueError) as error:
        # What MLX raises where the GPU's compiler refuses a text.
        return Check(on, case.what, math.nan, 0.0, str(error).strip() or type(error).__name__)
    references = case.reference(*map(float64, case.arrays), **case.options)
    found = [
        (_relative_error(float64(output), reference), _LIMITS.get(output.dtype, _EXACT))
        for output, reference in zip(outputs, references, strict=True)
    ]
    # NaN is the worst.
    worst = max(found, key=lambda pair: (math.isnan(pair[0]), pair[0] / pair[1]))
    return Check(on, case.what, *worst)


def _relative_error(output: Array, reference: Array) -> float:
    return float(np.abs(output - reference).max() / np.abs(reference).max())


def float64(array: mx.array) -> Array:
    """An array of any float type in NumPy, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
