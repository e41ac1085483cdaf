"""Random input for the losses, and what holds them against their float64 twins."""

import mlx.core as mx
import numpy as np


def mean(total, count):
    """Of a loss; 0 where there was nothing to count."""
    return total / mx.maximum(count, 1)


def numbers(seed, *shape, scale=2.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def some_mask(seed, *shape):
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask.flat[0] = True
    return mask


def as_type(values, dtype):
    """The values as MLX reads them in that type, and what they then are in float64."""
    array = mx.array(values).astype(getattr(mx, dtype))
    return array, np.array(array.astype(mx.float32)).astype(np.float64)


def pair(result):
    total, count = result
    assert total.dtype == count.dtype == mx.float32
    assert total.shape == count.shape == ()
    return total.item(), count.item()


def central(function, at, step=1e-6):
    """Gradient of a float64 function by central differences."""
    at = at.astype(np.float64)
    grad = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        high, low = at.copy(), at.copy()
        high[place] += step
        low[place] -= step
        grad[place] = (function(high) - function(low)) / (2 * step)
    return grad


def same_gradient(loss, twin, at):
    ours = np.array(mx.grad(lambda x: loss(x)[0])(mx.array(at)))
    np.testing.assert_allclose(ours, central(lambda x: twin(x)[0], at), rtol=2e-4, atol=2e-5)
