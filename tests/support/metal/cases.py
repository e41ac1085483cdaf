"""Inputs for our kernels, and what must come out."""

import mlx.core as mx
import numpy as np

from mlx_fd.losses import kernels
from mlx_fd.losses.kernel_checks import (
    alignment_reference,
    divergence_reference,
    float64,
    top_k_reference,
)

# What an output's type can hold.
ROUNDING = {mx.float32: 1e-5, mx.bfloat16: 5e-3, mx.float16: 1e-3, mx.int32: 0}


# For a top-k: the most candidates that there can be, some of each tile, the fewest, and ties.
ROWS = {
    "rising": np.arange(2000),
    "half rising": np.arange(2000) * (np.arange(2000) % 2),
    "equal": np.zeros(2000),
    "few values": np.random.default_rng(0).integers(0, 3, 2000),
}


def numbers(seed, *shape, size=3.0, dtype=mx.float32):
    values = np.random.default_rng(seed).standard_normal(shape) * size
    return mx.array(values.astype(np.float32)).astype(dtype)


def close(outputs, references, scale=0.0):
    """Within the rounding of the outputs' types, relative to a row's largest or to ``scale``."""
    for output, reference in zip(outputs, references, strict=True):
        assert output.shape == reference.shape
        got = float64(output)
        assert np.isfinite(got).all()
        axes = tuple(range(1, got.ndim))
        most = np.maximum(np.abs(reference).max(axis=axes, keepdims=True), scale)
        assert (np.abs(got - reference) <= ROUNDING[output.dtype] * most).all()


def of_twin(function, arrays, **options):
    return {
        kernels.divergence_rows: divergence_reference,
        kernels.alignment_rows: alignment_reference,
        kernels.top_k_rows: top_k_reference,
    }[function](*map(float64, arrays), **options)


def hidden(dtype, samples, positions, width, per_token):
    """States, and a mask under which there is NaN; the first sample is masked all over."""
    student = float64(numbers(0, samples, positions, width))
    shape = (samples, positions, width) if per_token else (samples, width)
    teacher = float64(numbers(1, *shape))
    mask = np.random.default_rng(2).random((samples, positions)) < 0.6
    mask[0], mask[-1, -1] = samples == 1, True
    student[~mask] = np.nan
    teacher[~mask if per_token else ~mask.any(axis=1)] = np.nan
    arrays = [mx.array(values.astype(np.float32)).astype(dtype) for values in (student, teacher)]
    return [*arrays, mx.array(mask)]
