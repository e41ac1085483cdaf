"""What a model does to its head's product, against float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd.models.logit_transform import LogitTransform

RAW = np.random.default_rng(0).standard_normal((4, 50)) * 40


def reference(raw, scale, cap):
    """The logits and their derivatives by ``raw``."""
    if cap is None:
        return scale * raw, np.full_like(raw, scale)
    return cap * np.tanh(scale * raw / cap), scale / np.cosh(scale * raw / cap) ** 2


@pytest.mark.parametrize(("scale", "cap"), [(1, None), (0.125, None), (1, 30), (0.25, 15), (-2, 5)])
def test_the_transform_and_its_derivative(scale, cap):
    transform = LogitTransform(scale, cap)
    raw = mx.array(RAW.astype(np.float32))
    logits, derivative = reference(np.array(raw, np.float64), scale, cap)
    made = transform.apply(raw)
    np.testing.assert_allclose(np.array(made), logits, rtol=1e-6, atol=1e-5)
    grad = transform.raw_gradient(mx.full(raw.shape, 2.0), made)
    np.testing.assert_allclose(np.array(grad), 2 * derivative, rtol=1e-5, atol=1e-6 * abs(scale))
    assert transform.is_identity == ((scale, cap) == (1, None))


def test_half_precision_is_transformed_in_float32():
    raw = mx.array(RAW.astype(np.float32)).astype(mx.bfloat16)
    assert LogitTransform(0.125, 30.0).apply(raw).dtype == mx.float32
    assert LogitTransform().apply(raw) is raw


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_a_scale_is_a_number(scale):
    with pytest.raises(ValueError, match="the scale of logits must be finite and not 0"):
        LogitTransform(scale)


@pytest.mark.parametrize("cap", [0.0, -30.0, math.nan, math.inf])
def test_a_cap_is_above_0(cap):
    with pytest.raises(ValueError, match="a soft cap of logits must be above 0"):
        LogitTransform(1.0, cap)
