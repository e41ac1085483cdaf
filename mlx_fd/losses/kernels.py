"""The row functions of the distillation engine, on whatever runs them fastest here.

The one place that knows which of Metal, CUDA and the MLX graph that is. The kernels are in
``kernels/``, one text for both dialects (its README says how); their twins in MLX's own operations
are in :mod:`mlx_fd.losses.graph`.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from mlx_fd.errors import UserError
from mlx_fd.losses import graph, kernel_checks
from mlx_fd.models.backend import backend
from mlx_fd.models.logit_transform import LogitTransform

# The student's and the teacher's.
Transforms: TypeAlias = tuple[LogitTransform, LogitTransform]
IDENTITY: Transforms = (LogitTransform(), LogitTransform())

VARIABLE = "MLX_FD_KERNELS"
# Threads of a threadgroup.
_THREADS = 256
# Places of 8 bytes in top-k's threadgroup memory, which Metal limits to 32 KiB.
_MAX_CAPACITY = 2048


def source_folder() -> Path:
    """Where the kernels' texts are: in the installed package, or next to it in the repository."""
    package = Path(__file__).parents[1]
    installed = package / "kernel_sources"
    return installed if installed.is_dir() else package.parent / "kernels"


@dataclass(frozen=True)
class _Signature:
    inputs: Sequence[str]
    outputs: Sequence[str]


_SIGNATURES = {
    "divergence": _Signature(("student", "teacher", "settings"), ("value", "gradient")),
    "alignment": _Signature(("student", "teacher", "mask", "weights"), ("value", "gradient")),
    "top_k": _Signature(("logits",), ("values", "indices", "log_sum_exp")),
}


def runnable() -> tuple[str, ...]:
    """What can run the row functions here: ``"graph"``, and ``"metal"`` or ``"cuda"``."""
    device = backend().device
    return ("graph",) if device == "cpu" else ("graph", device)


def chosen() -> str:
    """What runs the row functions: what ``MLX_FD_KERNELS`` says, else the fastest that is right.

    Kernels are shown on small input before they are used: one that the GPU's compiler refuses, or
    that is wrong on this GPU, leaves the work to the graph, with a warning.

    Raises:
        UserError: the variable names something unknown, or something that cannot run here.
    """
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        return _fastest_right()
    if forced not in ("graph", "metal", "cuda"):
        raise UserError(f"{VARIABLE}={forced}: must be graph, metal or cuda")
    if forced not in runnable():
        raise UserError(
            f"{VARIABLE}={forced}: MLX runs on {backend().device} here; unset it, or set it to one "
            f"of: {', '.join(runnable())}"
        )
    return forced


@functools.cache
def _fastest_right() -> str:
    fastest = runnable()[-1]
    if fastest == "graph":
        return fastest
    # In the type of most models: each type costs a compilation of every kernel.
    wrong = [check for check in check_rows(fastest, [mx.bfloat16]) if not check.passed]
    if not wrong:
        return fastest
    warnings.warn(
        f"the {fastest} kernels cannot be used here ({len(wrong)} of their checks fail), MLX's own "
        "operations run instead: `mlx-fd doctor --kernels` says more",
        stacklevel=2,
    )
    return "graph"


def check_rows(on: str, dtypes: Sequence[mx.Dtype] | None = None) -> list[kernel_checks.Check]:
    """The row functions on small random input, against float64.

    Args:
        on: one of :func:`runnable`.
        dtypes: of the logits and states; ``None``: float32, bfloat16 and float16.
    """
    rows = kernel_checks.RowFunctions(divergence_rows, alignment_rows, top_k_rows)
    return kernel_checks.run_checks(rows, on, *([dtypes] if dtypes else []))


def divergence_rows(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    beta: float,
    temperature: float,
    transforms: Transforms = IDENTITY,
    on: str | None = None,
) -> tuple[mx.array, mx.array]:
    """Generalised Jensen-Shannon divergence of each row, and its gradient.

    With p the teacher's and q the student's softmax of logits / T and m = beta p + (1 - beta) q
    (Agarwal et al., GKD, arXiv 2306.13649, equation 1; the convention of TRL's GKDTrainer)::

        D = beta KL(p || m) + (1 - beta) KL(q || m)        0 < beta < 1
        D = KL(p || q)                                     beta = 0, forward
        D = KL(q || p)                                     beta = 1, reverse

    The ends are set so: the formula itself goes to 0 there. Value and gradient are T^2 D and its
    derivative by the student's logits. Sums are float32. A logit of -inf has no probability; where
    only one of the two has it, a KL is finite but huge (1e20 times the other's probability).

    Args:
        student_logits: [n, V], any float type.
        teacher_logits: [n, V], any float type.
        beta: in [0, 1].
        temperature: T, above 0.
        transforms: the student's and the teacher's: what still makes logits of the two arrays,
            which are then the heads' products; the gradient is by the product.
        on: ``"graph"``, ``"metal"`` or ``"cuda"``; ``None`` for :func:`chosen`.

    Returns:
        The values [n], float32, and the gradient [n, V] in the type of ``student_logits``.
    """
    where = on or chosen()
    if where == "graph":
        plain = partial(graph.divergence_rows, beta=beta, temperature=temperature)
        return graph.transformed_rows(plain, *transforms, student_logits, teacher_logits)
    settings = [temperature, beta]
    for transform in transforms:
        # Of 0 the kernel makes no cap.
        settings += [transform.scale, transform.soft_cap or 0.0]
    rows = student_logits.shape[0]
    value, gradient = _launch(
        where,
        "divergence",
        [student_logits, teacher_logits, mx.array(settings, mx.float32)],
        [((rows,), mx.float32), (student_logits.shape, student_logits.dtype)],
        rows,
        T=student_logits.dtype,
        U=teacher_logits.dtype,
        KIND=0 if beta == 0 else 1 if beta == 1 else 2,
    )
    return value, gradient


def alignment_rows(
    student: mx.array, teacher: mx.array, mask: mx.array, *, on: str | None = None
) -> tuple[mx.array, mx.array]:
    """1 - cosine of hidden states for each sample, and its gradient.

    Of the mean state over the valid positions where ``teacher`` is pooled, else the mean over the
    valid positions of each position's. A sample without a valid position gives 0 and no gradient.

    Args:
        student: [B, T, d], any float type, already projected to the teacher's width.
        teacher: [B, d], pooled, or [B, T, d].
        mask: [B, T], 1 (true) where the position counts; under a 0 anything may stand, NaN too.
        on: ``"graph"``, ``"metal"`` or ``"cuda"``; ``None`` for :func:`chosen`.

    Returns:
        The values [B], float32, and the gradient [B, T, d] in the type of ``student``.
    """
    where = on or chosen()
    if where == "graph":
        return graph.alignment_rows(student, teacher, mask)
    samples, positions, width = student.shape
    valid = mask.astype(mx.bool_)
    # Each position is a group of its own, or all of a sample's are one.
    span = positions if teacher.ndim == 2 else 1
    groups = samples * positions // span
    weights = mx.ones((samples, 1))
    if span == 1:
        weights = valid / mx.maximum(valid.sum(axis=1, keepdims=True), 1).astype(mx.float32)
    values, gradient = _launch(
        where,
        "alignment",
        [
            student.reshape(groups, span, width),
            teacher.reshape(groups, width),
            valid.reshape(groups, span),
            weights.reshape(groups),
        ],
        [((groups,), mx.float32), ((groups, span, width), student.dtype)],
        groups,
        T=student.dtype,
        U=teacher.dtype,
        COLUMNS=-(-width // _THREADS),
    )
    return values.reshape(samples, -1).sum(axis=1), gradient.reshape(student.shape)


def top_k_rows(
    logits: mx.array, k: int, *, on: str | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """The k largest logits of each row, and the log-sum-exp of all of them.

    Args:
        logits: [n, V], any float type, without NaN.
        k: at most V. Above 1,792 the MLX graph runs everywhere.
        on: ``"graph"``, ``"metal"`` or ``"cuda"``; ``None`` for :func:`chosen`.

    Returns:
        Values [n, k] in the type of ``logits`` and their indices [n, k] (int32), by falling value,
        equal ones by rising index; log-sum-exp [n], float32.
    """
    where = on or chosen()
    capacity = 1 << (k + _THREADS - 1).bit_length()
    if where == "graph" or capacity > _MAX_CAPACITY:
        return graph.top_k_rows(logits, k)
    rows = logits.shape[0]
    values, indices, log_sum_exp = _launch(
        where,
        "top_k",
        [logits],
        [((rows, k), logits.dtype), ((rows, k), mx.int32), ((rows,), mx.float32)],
        rows,
        T=logits.dtype,
        K=k,
        CAPACITY=capacity,
    )
    return values, indices, log_sum_exp


def kernel_text(name: str, dialect: str) -> tuple[str, str]:
    """A kernel's text as MLX takes it.

    Args:
        name: ``"divergence"``, ``"alignment"`` or ``"top_k"``.
        dialect: ``"metal"`` or ``"cuda"``.

    Returns:
        The header and the body.
    """
    folder = source_folder()
    headers = ("common.metal",) if dialect == "metal" else ("cuda.h", "common.metal")
    header = "".join((folder / file).read_text(encoding="utf-8") for file in headers)
    return header, (folder / f"{name}.metal").read_text(encoding="utf-8")


@functools.cache
def _kernel(dialect: str, name: str) -> Callable[..., list[mx.array]]:
    make = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    header, body = kernel_text(name, dialect)
    signature = _SIGNATURES[name]
    return make(  # type: ignore[return-value]
        name=f"mlx_fd_{name}",
        input_names=signature.inputs,
        output_names=signature.outputs,
        source=body,
        header=header,
    )


def _launch(
    dialect: str,
    name: str,
    inputs: list[mx.array],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    threadgroups: int,
    **template: Any,
) -> list[mx.array]:
    return _kernel(dialect, name)(
        inputs=inputs,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        grid=(threadgroups * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        template=[*template.items(), ("THREADS", _THREADS)],
    )
