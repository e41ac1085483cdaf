"""What stands in the place of MLX's own functions on its CPU backend, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd.models import cpu_math
from mlx_fd.models.backend import backend

BACKEND = backend()
RNG = np.random.default_rng(0)


def softmax64(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attention64(q, k, v, scale, seen, added=0.0):
    """Attention and its gradient by the sum of its squares, by queries, keys and values."""
    times = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, times, axis=1), np.repeat(v, times, axis=1)
    scores = np.where(seen, scale * q @ keys.swapaxes(-1, -2) + added, -np.inf)
    weights = softmax64(scores)
    made = weights @ values
    grad = 2 * made
    by_weights = grad @ values.swapaxes(-1, -2)
    by_scores = weights * (by_weights - (weights * by_weights).sum(axis=-1, keepdims=True))
    grads = [scale * by_scores @ keys, scale * by_scores.swapaxes(-1, -2) @ q]
    grads.append(weights.swapaxes(-1, -2) @ grad)
    for place in (1, 2):
        batch, _, length, width = grads[place].shape
        grads[place] = grads[place].reshape(batch, -1, times, length, width).sum(axis=2)
    return made, grads


def causal(length, places):
    return np.arange(places - length, places)[:, None] >= np.arange(places)


SHAPES = [
    (2, 4, 4, 70, 70),
    (1, 6, 2, 33, 60),
    (3, 4, 1, 1, 40),
    (60, 4, 4, 1, 50),
    (40, 8, 8, 45, 45),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal", "none", "seen", "added", "by head"])
def test_attention_and_its_gradient(shape, kind):
    batch, heads, groups, length, places = shape
    q = RNG.normal(size=(batch, heads, length, 8))
    k, v = RNG.normal(size=(batch, groups, places, 8)), RNG.normal(size=(batch, groups, places, 6))
    seen, added, mask = np.ones((length, places), bool), 0.0, None
    if kind == "causal":
        seen, mask = causal(length, places), "causal"
    elif kind in ("seen", "by head"):
        seen = RNG.random((batch, heads if kind == "by head" else 1, length, places)) < 0.6
        seen[..., 0] = True
        mask = mx.array(seen)
    elif kind == "added":
        added = RNG.normal(size=(length, places))
        mask = mx.array(added.astype(np.float32))
    wanted, grads = attention64(q, k, v, 0.3, seen, added)
    given = [mx.array(part.astype(np.float32)) for part in (q, k, v)]

    def squares(*parts):
        made = cpu_math.attention(*parts, scale=0.3, mask=mask)
        return mx.square(made).sum(), made

    (_, made), found = mx.value_and_grad(squares, argnums=(0, 1, 2))(*given)
    np.testing.assert_allclose(np.array(made), wanted, atol=2e-6)
    for one, other in zip(found, grads, strict=True):
        np.testing.assert_allclose(np.array(one), other, atol=2e-5)


def test_what_a_mask_hides_counts_nothing():
    q = k = mx.ones((1, 2, 64, 4))
    v = mx.where(mx.arange(64)[:, None] < 32, 1.0, 1e6) * mx.ones((1, 2, 64, 4))
    made = cpu_math.attention(q, k, v, scale=1.0, mask="causal")
    np.testing.assert_allclose(np.array(made[..., :32, :]), 1.0, rtol=1e-6)


def test_sigmoid_and_its_gradient():
    x = np.concatenate([RNG.normal(size=9000) * 10, [0.0, -200.0, 200.0, -1e30, 1e30]])
    wanted = 1 / (1 + np.exp(-np.clip(x, -700, 700)))
    given = mx.array(x.astype(np.float32))
    np.testing.assert_allclose(np.array(cpu_math.sigmoid(given)), wanted, rtol=1e-5, atol=1e-37)
    grad = mx.grad(lambda a: cpu_math.sigmoid(a).sum())(given)
    np.testing.assert_allclose(np.array(grad), wanted * (1 - wanted), atol=2e-7)


def test_logsumexp_and_its_gradient():
    rows = RNG.normal(size=(7, 1300)) * 5
    rows[1, :900] = -np.inf
    rows[2] = -np.inf
    rows[3, 5] = np.inf
    given = mx.array(rows.astype(np.float32))
    found = cpu_math.logsumexp(given, axis=-1)
    assert np.array(found)[2] == -np.inf
    assert np.array(found)[3] == np.inf
    finite = [0, 1, 4, 5, 6]
    with np.errstate(divide="ignore"):
        wanted = np.log(np.exp(rows[finite]).sum(axis=-1))
    np.testing.assert_allclose(np.array(found)[finite], wanted, rtol=5e-7)
    kept = cpu_math.logsumexp(given, axis=1, keepdims=True)
    assert mx.array_equal(kept.squeeze(-1), found)
    grad = mx.grad(lambda a: cpu_math.logsumexp(a, axis=-1)[mx.array(finite)].sum())(given)
    np.testing.assert_allclose(np.array(grad)[finite], softmax64(rows[finite]), atol=4e-6)
    whole = cpu_math.logsumexp(given[mx.array(finite)])
    assert whole.item() == pytest.approx(np.log(np.exp(rows[finite]).sum()), abs=1e-5)


def test_other_types_are_mlxs_own():
    half = mx.array([0.3, -2.0], mx.float16)
    assert cpu_math.sigmoid(half).dtype == mx.float16
    assert cpu_math.logsumexp(half, axis=-1).dtype == mx.float16
    q = mx.ones((1, 1, 3, 8), mx.float16)
    assert cpu_math.attention(q, q, q, scale=1.0).dtype == mx.float16


@pytest.mark.skipif(not BACKEND.on_cpu, reason="MLX's own functions are fast on a GPU")
def test_models_of_mlx_lm_call_them():
    assert mx.fast.scaled_dot_product_attention is cpu_math.attention
    assert mx.sigmoid is cpu_math.sigmoid
    assert mx.logsumexp is cpu_math.logsumexp
