"""Random input for the losses, and what holds them against their float64 twins."""

import mlx.core as mx
import numpy as np
import pytest


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


# What every loss promises; a loss is a function of values and rows (a slice of samples).
ALL = slice(None)


def check_batch_is_its_parts(values, loss):
    """Eight samples at once are four batches of two, in value and gradient."""
    whole, grad = mx.value_and_grad(lambda x: mean(*loss(x, ALL)))(mx.array(values))
    total_count = loss(mx.array(values), ALL)[1]
    sums, grads = [], []
    for i in range(0, 8, 2):
        rows = slice(i, i + 2)
        part, part_slope = mx.value_and_grad(lambda x, r: mean(loss(x, r)[0], total_count))(
            mx.array(values[rows]), rows
        )
        sums.append(part.item())
        grads.append(np.array(part_slope))
    assert sum(sums) == pytest.approx(whole.item(), rel=1e-5)
    assert whole.item() > 0
    np.testing.assert_allclose(np.concatenate(grads), np.array(grad), rtol=1e-4, atol=1e-7)


def check_masked_places_poison_nothing(values, mask, loss, poison):
    """With ``poison`` where the mask is 0, value and gradient are the same to the bit."""
    clean_value, clean_slope = mx.value_and_grad(lambda x: loss(x, ALL)[0])(mx.array(values))
    bad = values.copy()
    bad[~mask] = poison
    value, grad = mx.value_and_grad(lambda x: loss(x, ALL)[0])(mx.array(bad))
    assert value.item() == clean_value.item()
    np.testing.assert_array_equal(np.array(grad), np.array(clean_slope))
    assert not np.array(grad)[~mask].any()
    assert np.array(grad)[mask].any()


def check_nothing_valid_gives_zero(values, loss, rows):
    """``rows`` are samples whose mask is empty."""
    total, count = pair(loss(mx.array(values[rows]), rows))
    assert (total, count) == (0, 0)
    grad = mx.grad(lambda x: mean(*loss(x, rows)))(mx.array(values[rows]))
    assert not np.array(grad).any()
