"""The fused linear divergence against float64 NumPy, the dense loss and MLX's own gradients."""

import itertools
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn

from mlx_fd.losses import divergence, graph
from mlx_fd.losses.chunks import chunk_size
from mlx_fd.losses.comparison import top_k_gap
from mlx_fd.losses.divergence import Target, fused_linear_divergence, fused_linear_divergences
from mlx_fd.losses.head import logit_head
from mlx_fd.losses.kernel_checks import (
    alignment_reference,
    divergence_reference,
    float64,
    top_k_reference,
)
from mlx_fd.losses.teacher import TopK, one_hot, teacher_top_k
from mlx_fd.models.memory import LOGIT_BUDGET
from support.dense_losses import language_model_loss, logit_loss
from support.loss_numbers import central, numbers
from support.reference_losses import top_k_divergence_rows
from support.summed_losses import hidden_alignment_loss

KINDS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}
BETAS = (0.0, 1.0, 0.5, 0.1)
# Of the value, and of the gradient by the largest gradient.
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 1e-2, mx.float16: 1e-2}
ROWS = [(1, 1), (1, 2), (3, 7), (2, 1003), (5, 32_771), (1, 151_936)]


def as_type(values, dtype=mx.float32):
    """The values as MLX reads them in that type, and what they then are in float64."""
    array = mx.array(values).astype(dtype)
    return array, float64(array)


def close(ours, expected, tolerance, floor=0.0):
    """Within a part of the largest number that is expected, or within ``floor``."""
    ours = float64(ours) if isinstance(ours, mx.array) else ours
    assert ours.shape == expected.shape
    allowed = max(tolerance * np.abs(expected).max(initial=0), floor)
    assert np.abs(ours - expected).max(initial=0) <= allowed


# --- the float64 twins ---


def gkd(student, teacher, beta, temperature):
    """TRL's generalized_jsd_loss for each row: with F.kl_div(m, p, log_target=True) = p (p - m)."""

    def log_softmax(logits):
        scaled = logits / temperature
        return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))

    def kl_div(log_input, log_target):
        return np.exp(log_target) * (log_target - log_input)

    student, teacher = log_softmax(student), log_softmax(teacher)
    if beta == 0:
        return kl_div(student, teacher).sum(-1)
    if beta == 1:
        return kl_div(teacher, student).sum(-1)
    mixture = np.log(np.exp(student + np.log1p(-beta)) + np.exp(teacher + np.log(beta)))
    each = beta * kl_div(mixture, teacher) + (1 - beta) * kl_div(mixture, student)
    return each.sum(-1)


@pytest.mark.parametrize("beta", BETAS)
def test_the_twin_is_trls_definition(beta):
    student, teacher = numbers(1, 4, 30).astype(float), numbers(2, 4, 30).astype(float)
    for temperature in (1.0, 0.9, 4.0):
        value, grad = divergence_reference(student, teacher, beta=beta, temperature=temperature)
        np.testing.assert_allclose(
            value, temperature**2 * gkd(student, teacher, beta, temperature), rtol=1e-12
        )
        expected = central(lambda x, t=temperature: t**2 * gkd(x, teacher, beta, t).sum(), student)
        np.testing.assert_allclose(grad, expected, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
def test_the_top_k_twin(beta):
    student, teacher = numbers(1, 3, 9).astype(float), numbers(2, 3, 9).astype(float)
    temperature = 1.5
    whole = np.logaddexp.reduce(teacher / temperature, axis=-1)
    for k in (1, 4, 9):
        indices = np.argsort(-teacher, axis=-1)[:, :k]
        values = np.take_along_axis(teacher, indices, -1)

        def divergence_of(x, indices=indices):
            """Merge the tail by hand, and take the plain divergence of what is left."""
            merged = []
            for row, chosen in zip(x, indices, strict=True):
                p = np.exp(row / temperature) / np.exp(row / temperature).sum()
                rest = np.delete(p, chosen).sum()
                merged.append(np.log([*p[chosen], *([rest] if len(chosen) < 9 else [])]))
            return np.array(merged)

        options = {"beta": beta, "temperature": temperature}
        value, grad = top_k_divergence_rows(student, values, indices, whole, **options)
        target = divergence_of(teacher)
        np.testing.assert_allclose(
            value, temperature**2 * gkd(divergence_of(student), target, beta, 1.0), rtol=1e-10
        )
        expected = central(
            lambda x, target=target: (
                temperature**2 * gkd(divergence_of(x), target, beta, 1.0).sum()
            ),
            student,
        )
        np.testing.assert_allclose(grad, expected, atol=1e-8)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_alignment_twin(pooled):
    student = numbers(1, 3, 4, 5).astype(float)
    teacher = numbers(2, 3, *([] if pooled else [4]), 5).astype(float)
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    value, grad = alignment_reference(student, teacher, mask)
    expected = central(lambda x: alignment_reference(x, teacher, mask)[0].sum(), student)
    np.testing.assert_allclose(grad, expected, atol=1e-8)
    assert value[1] == 0
    last = teacher[2] if pooled else teacher[2, 1]
    cosine = student[2, 1] @ last / np.linalg.norm(student[2, 1]) / np.linalg.norm(last)
    assert value[2] == pytest.approx(1 - cosine)


# --- the row functions ---


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", ROWS)
def test_divergence_rows(shape, beta, dtype):
    student, student64 = as_type(numbers(1, *shape), dtype)
    teacher, teacher64 = as_type(numbers(2, *shape), dtype)
    for temperature in (1.0, 4.0):
        options = {"beta": beta, "temperature": temperature}
        value, grad = graph.divergence_rows(student, teacher, **options)
        assert value.dtype == mx.float32
        assert grad.dtype == dtype
        expected, expected_slope = divergence_reference(student64, teacher64, **options)
        # The value is not rounded to the type. Below a hundredth of a nat, what float32 knows of a
        # probability is more than 1e-5 of it.
        floor = 1e-7 * temperature**2
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-5, atol=floor)
        close(grad, expected_slope, TOLERANCE[dtype], floor=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_rows_of_logits_up_to_ten_thousand(beta):
    spread = {
        "shifted": (numbers(1, 4, 501) + 9990, numbers(2, 4, 501) - 9990),
        "wide": (numbers(1, 4, 501, scale=2500), numbers(2, 4, 501, scale=2500)),
        "ends": tuple(
            np.random.default_rng(i).choice([-1e4, 0.0, 1e4], (4, 501)).astype(np.float32)
            for i in (1, 2)
        ),
    }
    for student, teacher in spread.values():
        options = {"beta": beta, "temperature": 1.0}
        value, grad = graph.divergence_rows(mx.array(student), mx.array(teacher), **options)
        expected, expected_slope = divergence_reference(student, teacher, **options)
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-5)
        close(grad, expected_slope, 1e-5, floor=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_a_logit_of_minus_infinity_has_no_probability(beta):
    student, teacher = numbers(1, 3, 50), numbers(2, 3, 50)
    student[:, 7:20] = teacher[:, 7:20] = -np.inf
    options = {"beta": beta, "temperature": 2.0}
    value, grad = graph.divergence_rows(mx.array(student), mx.array(teacher), **options)
    expected, expected_slope = divergence_reference(student, teacher, **options)
    np.testing.assert_allclose(np.array(value), expected, rtol=1e-5)
    close(grad, expected_slope, 1e-5)
    # In one of the two only: what a KL says is huge, and the Jensen-Shannon divergence is not.
    student[:, 30] = -np.inf
    teacher[:, 31] = -np.inf
    value, grad = graph.divergence_rows(mx.array(student), mx.array(teacher), **options)
    assert np.isfinite(np.array(grad)).all()
    if 0 < beta < 1:
        expected, _ = divergence_reference(student, teacher, **options)
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-5)
    else:
        assert (np.array(value) > 1e15).all()


@pytest.mark.parametrize("beta", BETAS)
def test_equal_rows_do_not_diverge(beta):
    logits = mx.array(numbers(1, 3, 40_000))
    value, grad = graph.divergence_rows(logits, logits, beta=beta, temperature=1.0)
    assert np.abs(np.array(value)).max() < 1e-6
    assert np.abs(np.array(grad)).max() < 1e-7
    # Nor do nearly equal ones get lost: the gradient is right to a thousandth of itself.
    moved = numbers(1, 3, 40_000) + numbers(2, 3, 40_000, scale=1e-3)
    value, grad = graph.divergence_rows(mx.array(moved), logits, beta=beta, temperature=1.0)
    expected, expected_slope = divergence_reference(
        moved, np.array(logits), beta=beta, temperature=1.0
    )
    np.testing.assert_allclose(np.array(value), expected, atol=1e-7)
    close(grad, expected_slope, 1e-3)


def test_the_exponential():
    rows = np.concatenate([np.linspace(-87, 0, 100_001), [-0.0, -1e-30]]).astype(np.float32)
    exact = np.exp(rows.astype(np.float64))
    ours = float64(graph._exp(mx.array(rows)))
    # A float32 power of 2 in that range is known to 4e-6 of it at best; near 0 to 3e-7.
    assert np.abs(ours / exact - 1).max() < 5e-6
    assert np.abs(ours - exact).max() < 3e-7
    assert graph._exp(mx.array([0.0])).item() == 1.0
    assert graph._exp(mx.array([-100.0, -1e4, -1e20])).max().item() < 2e-38


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (4, 7, 33)])
def test_alignment_rows(shape, pooled, dtype):
    batch, tokens, width = shape
    student, student64 = as_type(numbers(1, *shape), dtype)
    teacher, teacher64 = as_type(numbers(2, batch, *([] if pooled else [tokens]), width), dtype)
    mask = np.random.default_rng(3).random((batch, tokens)) < 0.6
    mask[0, 0] = True
    mask[1:2] = False
    value, grad = graph.alignment_rows(student, teacher, mx.array(mask))
    assert value.dtype == mx.float32
    assert grad.dtype == dtype
    expected, expected_slope = alignment_reference(student64, teacher64, mask)
    np.testing.assert_allclose(np.array(value), expected, rtol=1e-5, atol=1e-6)
    close(grad, expected_slope, TOLERANCE[dtype], floor=1e-6)


def test_alignment_rows_are_the_losss():
    student, teacher = numbers(1, 3, 4, 5), numbers(2, 3, 4, 5)
    mask = mx.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    pooled = mx.array(teacher.mean(axis=1))
    value, grad = graph.alignment_rows(mx.array(student), pooled, mask)
    total, expected = mx.value_and_grad(
        lambda x: hidden_alignment_loss([x], [pooled], mask, None)[0]
    )(mx.array(student))
    assert value.sum().item() == pytest.approx(total.item(), rel=1e-6)
    close(grad, float64(expected), 1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_alignment_rows_see_nothing_under_the_mask(pooled):
    student, teacher = numbers(1, 2, 3, 4), numbers(2, 2, *([] if pooled else [3]), 4)
    mask = np.array([[1, 0, 1], [0, 0, 0]])
    student[mask == 0] = np.nan
    if pooled:
        teacher[1] = np.nan
    else:
        teacher[mask == 0] = np.nan
    value, grad = graph.alignment_rows(mx.array(student), mx.array(teacher), mx.array(mask))
    assert np.isfinite(np.array(grad)).all()
    assert value[1].item() == 0
    assert not np.array(grad)[mask == 0].any()
    # A state of zeros has no direction, and a finite gradient.
    value, grad = graph.alignment_rows(
        mx.zeros((1, 2, 4)), mx.array(numbers(3, 1, *([] if pooled else [2]), 4)), mx.ones((1, 2))
    )
    assert value.item() == pytest.approx(1)
    assert np.isfinite(np.array(grad)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1), 1), ((3, 8), 8), ((4, 1000), 20), ((2, 32_771), 64)]
)
def test_top_k_rows(shape, k, dtype):
    logits, logits64 = as_type(numbers(1, *shape), dtype)
    values, indices, log_sum_exp = graph.top_k_rows(logits, k)
    assert values.dtype == dtype
    expected = top_k_reference(logits64, k)
    assert np.array_equal(float64(values), expected[0])
    # bfloat16 and float16 have many equal logits: the lower index comes first.
    assert np.array_equal(np.array(indices), expected[1])
    np.testing.assert_allclose(np.array(log_sum_exp), expected[2], rtol=1e-5)


def test_top_k_rows_of_equals_zeros_and_infinities():
    rows = np.array([[0.0, -0.0, 1.0, 0.0, -np.inf, 1.0], [-5.0, -np.inf, -7, -5, -5, -6]])
    values, indices, _ = graph.top_k_rows(mx.array(rows.astype(np.float32)), 5)
    assert indices.tolist() == [[2, 5, 0, 1, 3], [0, 3, 4, 5, 2]]
    assert values.tolist() == [[1, 1, 0, 0, 0], [-5, -5, -5, -6, -7]]


# --- heads ---


def head(form, rows, width, dtype=mx.float32):
    """A head, and its weight and bias in float64."""
    quantized = "bits" in form
    bias = form in ("bias", "4 bits, groups of 64")
    module = nn.Embedding(rows, width) if "tied" in form else nn.Linear(width, rows, bias=bias)
    module.weight = mx.array(numbers(3, rows, width, scale=0.3))
    if bias:
        module.bias = mx.array(numbers(4, rows))
    if quantized:
        bits, group_size = int(form[0]), int(form.split()[4].rstrip(","))
        if "tied" in form:
            module = nn.QuantizedEmbedding.from_embedding(module, group_size, bits)
        else:
            module = nn.QuantizedLinear.from_linear(module, group_size, bits)
    module.set_dtype(dtype)
    weight = module.weight
    if quantized:
        groups = [part.astype(mx.float32) for part in (module.scales, module.biases)]
        weight = mx.dequantize(weight, *groups, group_size=group_size, bits=bits)
    return module, float64(weight), float64(module.bias) if bias else np.zeros(rows)


HEADS = [
    "linear",
    "bias",
    "tied",
    "4 bits, groups of 32",
    "4 bits, groups of 64",
    "4 bits, groups of 128",
    "8 bits, groups of 64",
    "4 bits, groups of 64, tied",
]


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", HEADS)
def test_a_heads_products(form, dtype, widen, monkeypatch):
    """As on a GPU, and as on a CPU: with so little room that the weight takes several tiles."""
    monkeypatch.setattr("mlx_fd.losses.head._TILE_BYTES", 7 * 4 * 128)
    module, weight, bias = head(form, 45, 128, dtype)
    matrix = replace(logit_head(module, 41), widen=widen)
    hidden, hidden64 = as_type(numbers(5, 6, 128), dtype)
    # Unwidened, a CPU even sums in the type.
    tolerance = 1e-5 if widen else 5 * TOLERANCE[dtype]
    close(matrix.logits(hidden), hidden64 @ weight[:41].T + bias[:41], tolerance)
    # As small as a softmax's over a large vocabulary.
    grad = numbers(6, 6, 41, scale=1e-6)
    grad_hidden = matrix.input_gradient(mx.array(grad), hidden)
    close(grad_hidden, grad.astype(np.float64) @ weight[:41], tolerance)


def test_what_is_no_head_is_named():
    with pytest.raises(ValueError, match="not Conv1d"):
        logit_head(nn.Conv1d(1, 1, 1), 1)
    with pytest.raises(ValueError, match="vocab = 9, but the head has 8 rows"):
        logit_head(nn.Linear(4, 8), 9)


# --- the fused loss ---


def expected_loss(logits, teacher_logits, weights, kind, temperature, beta=KINDS["jsd"]):
    """Value and gradient by the student's logits, in float64."""
    counted = np.flatnonzero(weights)
    value, grad = divergence_reference(
        logits[counted],
        teacher_logits[counted],
        beta={**KINDS, "jsd": beta}[kind],
        temperature=temperature,
    )
    gradient = np.zeros_like(logits)
    gradient[counted] = weights[counted, None] * grad
    return float(value @ weights[counted]), gradient


def models(rows, width, student="bias", teacher="linear", dtype=mx.float32, padding=(3, 10)):
    """A student's and a teacher's head over a shared vocabulary, differently padded."""
    return (
        head(student, rows + padding[0], width, dtype),
        head(teacher, rows + padding[1], 2 * width, dtype),
    )


def fused(hidden, ours, teacher, theirs, weights, vocab, kind="forward", **options):
    chunk = options.pop("chunk", None)
    given = {"beta": KINDS["jsd"], "mask": mx.array(weights), "vocab": vocab, **options}
    target = Target.teacher(teacher, theirs, kind=kind, **given)
    return fused_linear_divergence(hidden, ours, target, chunk=chunk)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize(
    "teacher", ["linear", "4 bits, groups of 64", "4 bits, groups of 64, tied"]
)
def test_the_fused_loss(student, teacher, kind, dtype, monkeypatch):
    """In chunks of tokens, and in each as many rows at a time as a tiny cache holds."""
    n, vocab, width = 7, 53, 128
    monkeypatch.setattr(divergence, "_CACHE_BYTES", 2 * 4 * vocab)
    (ours, weight, bias), (theirs, their_weight, their_bias) = models(
        vocab, width, student, teacher, dtype
    )
    hidden, hidden64 = as_type(numbers(1, n, width, scale=0.5), dtype)
    target, target64 = as_type(numbers(2, n, 2 * width, scale=0.5), dtype)
    weights = np.array([1, 0, 0.5, 1, 2, 0, 1])
    options = {"kind": kind, "temperature": 2.0}

    def loss(x, chunk):
        return fused(x, ours, target, theirs, weights, vocab, chunk=chunk, **options)[0]

    logits = (hidden64 @ weight.T + bias)[:, :vocab]
    teacher_logits = (target64 @ their_weight.T + their_bias)[:, :vocab]
    expected, by_logits = expected_loss(logits, teacher_logits, weights, **options)
    for chunk in (None, 1, 3, 4):
        value, grad = mx.value_and_grad(loss)(hidden, chunk)
        assert value.dtype == mx.float32
        assert grad.dtype == dtype
        assert value.item() == pytest.approx(expected, rel=1e-5)
        close(grad, by_logits @ weight[:vocab], TOLERANCE[dtype])
    count = fused(hidden, ours, target, theirs, weights, vocab, **options)[1]
    assert count.dtype == mx.float32
    assert count.item() == 5.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (1, 2), (1, 1009), (17, 31), (65, 4099)])
def test_one_token_and_odd_sizes(n, vocab, kind):
    (ours, weight, bias), (theirs, their_weight, _) = models(vocab, 32, padding=(0, 0))
    hidden, target = numbers(1, n, 32, scale=0.5), numbers(2, n, 64, scale=0.5)
    value, grad = mx.value_and_grad(
        lambda x: fused(x, ours, mx.array(target), theirs, np.ones(n), vocab, kind)[0]
    )(mx.array(hidden))
    expected, by_logits = expected_loss(
        hidden.astype(float) @ weight.T + bias,
        target.astype(float) @ their_weight.T,
        np.ones(n),
        kind,
        1.0,
    )
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    close(grad, by_logits @ weight, 1e-5, floor=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_up_to_ten_thousand(kind):
    """Of small whole numbers, so that the product itself is exact."""
    rng = np.random.default_rng(0)
    ours, theirs = nn.Linear(8, 300, bias=False), nn.Linear(8, 300, bias=False)
    weight, their_weight = rng.integers(-35, 36, (300, 8)), rng.integers(-35, 36, (300, 8))
    ours.weight, theirs.weight = mx.array(weight * 1.0), mx.array(their_weight * 1.0)
    hidden, target = rng.integers(-35, 36, (40, 8)) * 1.0, rng.integers(-35, 36, (40, 8)) * 1.0
    logits, teacher_logits = hidden @ weight.T, target @ their_weight.T
    assert np.abs(logits).max() > 5000
    value, grad = mx.value_and_grad(
        lambda x: fused(x, ours, mx.array(target), theirs, np.ones(40), 300, kind)[0]
    )(mx.array(hidden))
    expected, by_logits = expected_loss(logits, teacher_logits, np.ones(40), kind, 1.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    close(grad, by_logits @ weight, 1e-5, floor=1e-5)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_loss(kind, standardize):
    n, vocab, width = 11, 400, 32
    (ours, _, _), (theirs, _, _) = models(vocab, width)
    hidden, target = mx.array(numbers(1, n, width)), mx.array(numbers(2, n, 2 * width))
    mask = mx.array(np.random.default_rng(0).random(n) < 0.7)
    shared = {"temperature": 4.0, "vocab": vocab, "standardize": standardize}

    def dense(x):
        logits = [ours(x)[None], theirs(target)[None]]
        return logit_loss(*logits, mask[None], kl=kind, **shared)[0]

    def engine(x):
        wanted = Target.teacher(target, theirs, mask=mask, kind=kind, **shared)
        return fused_linear_divergence(x, ours, wanted, chunk=4)[0]

    expected, expected_slope = mx.value_and_grad(dense)(hidden)
    value, grad = mx.value_and_grad(engine)(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    close(grad, float64(expected_slope), 1e-5)


def test_standardised_rows_of_equals_have_a_gradient():
    ours = nn.Linear(4, 9)
    theirs = nn.Linear(4, 9)
    ours.weight, ours.bias = mx.zeros((9, 4)), mx.zeros((9,))
    grad = mx.grad(
        lambda x: fused(
            x, ours, mx.ones((3, 4)), theirs, np.ones(3), 9, standardize=True, temperature=2.0
        )[0]
    )(mx.ones((3, 4)))
    assert np.isfinite(np.array(grad)).all()


def gradients(loss, learns, hidden):
    """The value, and the gradients by the hidden states and by what the head learns."""
    value, grad_head = nn.value_and_grad(learns, loss)(hidden)
    grad_hidden = mx.grad(loss)(hidden)
    return value.item(), float64(grad_hidden), {name: float64(g) for name, g in grad_head.items()}


@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mask_leaves_out_poisons_nothing(kind, top_k):
    n, vocab, width = 6, 40, 16
    ours, theirs = nn.Linear(width, vocab), nn.Linear(width, vocab)
    hidden, target = mx.array(numbers(1, n, width)), mx.array(numbers(2, n, width))
    mask = np.array([1, 0, 1, 0, 0, 1])
    left_out = mx.array(mask == 0)[:, None]

    def results(hidden, target, mask, garbage):
        def at_garbage(values, what):
            return mx.where(garbage.reshape(-1, *[1] * (values.ndim - 1)), what, values)

        if top_k:
            values, indices, whole = graph.top_k_rows(theirs(target), 5)
            teacher = TopK(
                at_garbage(values, math.nan),
                at_garbage(indices, 10**6),
                at_garbage(whole, math.nan),
            )
        else:
            teacher = at_garbage(target, math.nan)

        def loss(x):
            their_head = None if top_k else theirs
            return fused(x, ours, teacher, their_head, mask, vocab, kind, chunk=4)[0]

        return gradients(loss, ours, at_garbage(hidden, math.nan))

    value, grad_hidden, grad_head = results(hidden, target, mask, left_out)
    clean = results(hidden, target, mask, mx.zeros((n, 1), mx.bool_))
    assert value == pytest.approx(clean[0], rel=1e-6)
    close(grad_hidden, clean[1], 1e-6)
    assert not grad_hidden[mask == 0].any()
    assert grad_hidden[mask == 1].all()
    for name, expected in clean[2].items():
        close(grad_head[name], expected, 1e-6)
    value, grad_hidden, grad_head = results(hidden, target, np.zeros(n), mx.ones((n, 1), mx.bool_))
    assert value == 0
    assert not grad_hidden.any()
    assert not any(part.any() for part in grad_head.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["linear", "bias", "tied"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_head_that_trains(dtype, form, kind):
    n, vocab, width = 9, 37, 16
    (ours, weight, bias), (theirs, their_weight, _) = models(vocab, width, form, dtype=dtype)
    hidden, hidden64 = as_type(numbers(1, n, width), dtype)
    target, target64 = as_type(numbers(2, n, 2 * width), dtype)
    weights = np.array([1, 0, 0.5, 1, 2, 0, 1, 1, 1])

    def loss(x):
        return fused(x, ours, target, theirs, weights, vocab, kind, chunk=4)[0]

    value, grad_hidden, grad_head = gradients(loss, ours, hidden)
    expected, by_logits = expected_loss(
        (hidden64 @ weight.T + bias)[:, :vocab],
        target64 @ their_weight[:vocab].T,
        weights,
        kind,
        1.0,
    )
    padding = np.zeros((len(weight) - vocab, width))
    assert value == pytest.approx(expected, rel=1e-5)
    close(grad_hidden, by_logits @ weight[:vocab], TOLERANCE[dtype])
    close(grad_head["weight"], np.vstack([by_logits.T @ hidden64, padding]), TOLERANCE[dtype])
    if form == "bias":
        by_bias = np.append(by_logits.sum(axis=0), padding[:, 0])
        close(grad_head["bias"], by_bias, TOLERANCE[dtype])
        ours.freeze(keys=["weight"])
        assert list(gradients(loss, ours, hidden)[2]) == ["bias"]


def test_a_tied_head_learns_from_both_ends():
    vocab, width = 30, 8
    embedding, theirs = nn.Embedding(vocab, width), nn.Linear(width, vocab)
    tokens, target = mx.array([3, 1, 4, 1, 5]), mx.array(numbers(2, 5, width))

    def loss(logits_of):
        def of(module):
            return logits_of(mx.tanh(module(tokens)))

        return nn.value_and_grad(embedding, lambda: of(embedding))()

    value, grad = loss(lambda x: fused(x, embedding, target, theirs, np.ones(5), vocab)[0])
    expected, expected_slope = loss(
        lambda x: logit_loss(
            embedding.as_linear(x)[None],
            theirs(target)[None],
            mx.ones((1, 5)),
            kl="forward",
            temperature=1.0,
            vocab=vocab,
            standardize=False,
        )[0]
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    close(grad["weight"], float64(expected_slope["weight"]), 1e-5)


# --- the teacher's top k ---


def teachers_top_k(teacher_logits, k, temperature):
    values, indices, _ = graph.top_k_rows(teacher_logits, k)
    return TopK(values, indices, mx.logsumexp(teacher_logits / temperature, axis=-1))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 8, 60])
def test_top_k_of_the_teacher(k, kind, dtype):
    n, vocab, width, temperature = 9, 60, 16, 2.0
    ours, weight, bias = head("bias", vocab + 3, width, dtype)
    hidden, hidden64 = as_type(numbers(1, n, width), dtype)
    logits = numbers(2, n, vocab)
    weights = np.array([1, 0, 0.5, 1, 2, 0, 1, 1, 1])
    top = teachers_top_k(mx.array(logits), k, temperature)
    expected, by_logits = top_k_divergence_rows(
        (hidden64 @ weight.T + bias)[:, :vocab],
        float64(top.values),
        np.array(top.indices),
        np.logaddexp.reduce(logits.astype(float) / temperature, axis=-1),
        beta=KINDS[kind],
        temperature=temperature,
    )
    for chunk in (None, 4):
        value, grad = mx.value_and_grad(
            lambda x, chunk=chunk: fused(
                x, ours, top, None, weights, vocab, kind, temperature=temperature, chunk=chunk
            )[0]
        )(hidden)
        assert value.item() == pytest.approx(expected @ weights, rel=1e-5)
        close(grad, (weights[:, None] * by_logits) @ weight[:vocab], TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_all_k_are_the_full_distribution_and_fewer_are_never_above_it(kind):
    n, vocab, width = 5, 80, 16
    ours, theirs = nn.Linear(width, vocab), nn.Linear(width, vocab)
    hidden, target = mx.array(numbers(1, n, width)), mx.array(numbers(2, n, width))
    whole = fused(hidden, ours, target, theirs, np.ones(n), vocab, kind)[0].item()
    values = [
        fused(hidden, ours, teachers_top_k(theirs(target), k, 1.0), None, np.ones(n), vocab, kind)[
            0
        ].item()
        for k in (1, 10, 40, 79, 80)
    ]
    # What a coarser view of two distributions cannot tell apart only falls: data processing.
    assert all(less < more * (1 + 1e-5) for less, more in itertools.pairwise(values))
    assert values[-1] == pytest.approx(whole, rel=1e-5)
    assert 0 < values[0] < 0.9 * whole


def test_a_tail_that_float32_cannot_see():
    """The teacher is sure, and the student surer still: its others are below 1e-38."""
    ours = nn.Linear(1, 3, bias=False)
    ours.weight = mx.array([[0.0], [-300.0], [-300.0]])
    teacher = TopK(mx.array([[0.0]]), mx.array([[0]]), mx.array([math.log(1.25)]))
    value, grad = mx.value_and_grad(lambda x: fused(x, ours, teacher, None, np.ones(1), 3)[0])(
        mx.ones((1, 1))
    )
    # p = (4/5, 1/5), log q = (0, ln 2 - 300).
    assert value.item() == pytest.approx(
        0.8 * math.log(0.8) + 0.2 * (math.log(0.2) - math.log(2) + 300), rel=1e-6
    )
    assert grad.item() == pytest.approx(0.2 * 300, rel=1e-6)


def test_a_sure_teacher_is_the_cross_entropy():
    n, vocab, width = 7, 50, 16
    ours = nn.Linear(width, vocab)
    hidden = mx.array(numbers(1, n, width))
    targets = mx.array(np.random.default_rng(0).integers(0, vocab, n))
    mask = mx.array([1, 1, 0, 1, 0, 1, 1])
    value, grad = mx.value_and_grad(
        lambda x: fused(x, ours, one_hot(targets), None, mask, vocab, chunk=3)[0]
    )(hidden)
    expected, expected_slope = mx.value_and_grad(
        lambda x: language_model_loss(ours(x)[None], targets[None], mask[None])[0]
    )(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    close(grad, float64(expected_slope), 1e-5)


# --- how it is evaluated ---


def problem(n=40, vocab=701, width=32):
    (ours, _, _), (theirs, _, _) = models(vocab, width, "linear")
    ours.freeze()
    hidden, target = mx.array(numbers(1, n, width)), mx.array(numbers(2, n, 2 * width))

    def loss(x, y=target, mask=None, **options):
        weights = np.ones(len(x)) if mask is None else mask
        return fused(x, ours, y, theirs, weights, vocab, "jsd", **options)

    return hidden, target, loss


@given(st.integers(1, 41))
def test_the_chunk_changes_nothing(chunk):
    hidden, _, loss = problem()
    expected, expected_slope = mx.value_and_grad(lambda x: loss(x)[0])(hidden)
    value, grad = mx.value_and_grad(lambda x: loss(x, chunk=chunk)[0])(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    close(grad, float64(expected_slope), 3e-6)


@given(st.integers(1, 5000), st.integers(1, 300_000), st.integers(2, 6))
def test_chunks_fit_the_budget_and_are_equal(n, vocab, arrays):
    chunk = chunk_size(n, vocab, arrays)
    most = LOGIT_BUDGET // (4 * vocab * arrays)
    assert 1 <= chunk <= max(1, min(n, most))
    if n <= most:
        assert chunk == n
    chunks = math.ceil(n / chunk)
    assert chunks == math.ceil(n / max(1, most))
    assert chunk - (n - (chunks - 1) * chunk) < chunks


def test_half_batches_add_up():
    hidden, target, loss = problem()
    count = loss(hidden)[1]

    def half(x, rows):
        return loss(x, target[rows])[0] / count

    expected, expected_slope = mx.value_and_grad(lambda x: loss(x)[0] / loss(x)[1])(hidden)
    parts = [mx.value_and_grad(half)(hidden[r], r) for r in (slice(0, 25), slice(25, 40))]
    assert sum(value.item() for value, _ in parts) == pytest.approx(expected.item(), rel=1e-6)
    close(np.concatenate([float64(grad) for _, grad in parts]), float64(expected_slope), 2e-6)


def test_under_checkpoint_and_further_up_the_graph():
    hidden, _, loss = problem()
    weight = mx.array(numbers(4, 32, 32, scale=0.2))

    def model(w, x):
        return 3 * loss(mx.tanh(x @ w), chunk=16)[0]

    expected, expected_slope = mx.value_and_grad(model)(weight, hidden)
    value, grad = mx.value_and_grad(mx.checkpoint(model))(weight, hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    close(grad, float64(expected_slope), 2e-6)
    # And this is right: along the gradient the loss changes as the gradient says.
    step = 1e-2 * grad / mx.linalg.norm(grad)
    rise = model(weight + step, hidden) - model(weight - step, hidden)
    assert rise.item() == pytest.approx(2e-2 * mx.linalg.norm(grad).item(), rel=1e-2)


@pytest.mark.skipif(not shutil.which("c++"), reason="MLX compiles with a C++ compiler on a CPU")
@pytest.mark.parametrize("chunk", [None, 16])
def test_under_compile(chunk):
    hidden, _, loss = problem()

    def step(x):
        return mx.value_and_grad(lambda x: loss(x, chunk=chunk)[0])(x)

    expected, expected_slope = step(hidden)
    mx.eval(expected, expected_slope)
    mx.enable_compile()
    try:
        value, grad = mx.compile(step)(hidden)
        mx.eval(value, grad)
    finally:
        mx.disable_compile()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    close(grad, float64(expected_slope), 2e-6)


def test_the_gradient_is_made_with_the_value(tmp_path):
    """There is no product in the graph of value and gradient that the value's does not have."""

    def products(*outputs):
        mx.export_to_dot(str(tmp_path / "graph.dot"), *outputs)
        return (tmp_path / "graph.dot").read_text().count("Matmul")

    hidden, _, loss = problem()
    value, grad = mx.value_and_grad(lambda x: loss(x, chunk=16)[0])(hidden)
    assert products(value) == products(value, grad) > 0


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "linear") for kind in KINDS), ("forward", "4 bits, groups of 64")]
)
def test_only_a_chunk_of_logits_exists_at_a_time(kind, form):
    n, vocab, width = 1024, 16_384, 16
    (ours, _, _), _ = models(vocab, width, "linear", padding=(0, 0))
    ours.freeze()
    theirs, _, _ = head(form, vocab, 128)
    hidden, target = mx.array(numbers(1, n, width)), mx.array(numbers(2, n, 128))
    mx.eval(hidden, target, ours.parameters(), theirs.parameters())

    def peak(loss):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return (mx.get_peak_memory() - before) / (4 * n * vocab)

    def engine(chunk):
        return lambda x: fused(x, ours, target, theirs, np.ones(n), vocab, kind, chunk=chunk)[0]

    # In [n, vocab] of float32. Beside the chunk's arrays there is what the CPU's cache holds.
    assert peak(engine(64)) < 1
    assert peak(engine(n)) > 2.9


def test_misuse_is_named():
    hidden, target, loss = problem()
    linear = nn.Linear(64, 701)
    with pytest.raises(ValueError, match="kind must be"):
        fused(hidden, linear, target, linear, np.ones(40), 701, "backward")
    for beta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="beta must be between 0 and 1"):
            loss(hidden, beta=beta)
    with pytest.raises(ValueError, match="need its head"):
        fused(hidden, linear, target, None, np.ones(40), 701)
    top = teachers_top_k(mx.zeros((40, 9)), 3, 1.0)
    with pytest.raises(ValueError, match="spread"):
        fused(hidden, linear, top, None, np.ones(40), 701, standardize=True)


# --- several divergences at once ---


def several(n=23, vocab=301, width=32, dtype=mx.float32):
    """Cross entropy over a head's padding too, and two divergences over the shared vocabulary."""
    (ours, _, _), (theirs, _, _) = models(vocab, width, "bias")
    hidden, target = (
        mx.array(numbers(s, n, w)).astype(dtype) for s, w in ((1, width), (2, 2 * width))
    )
    rng = np.random.default_rng(3)
    tokens = mx.array(rng.integers(0, vocab, n))
    weights = [mx.array(rng.random(n).astype(np.float32) * (rng.random(n) < 0.6)) for _ in range(3)]
    rows = ours.weight.shape[0]
    targets = [
        Target(one_hot(tokens), None, weights[0], "forward", 1.0, rows),
        Target(target, theirs, weights[1], "jsd", 2.0, vocab - 7),
        Target(target, theirs, weights[2], "reverse", 1.5, vocab - 7, standardize=True),
    ]
    return hidden, ours, targets


def one_by_one(hidden, head, targets):
    return sum(
        fused_linear_divergence(hidden, head, replace(t, mask=t.weights != 0))[0] for t in targets
    )


@pytest.mark.parametrize("chunk", [None, 5])
def test_several_are_the_sum_of_each(chunk):
    hidden, head, targets = several()
    expected, expected_slope = mx.value_and_grad(lambda x: one_by_one(x, head, targets))(hidden)
    value, grad = mx.value_and_grad(
        lambda x: fused_linear_divergences(x, head, targets, chunk=chunk)[0]
    )(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    close(grad, float64(expected_slope), 3e-6)
    gradient = nn.value_and_grad(head, lambda: one_by_one(hidden, head, targets))()[1]
    trained = nn.value_and_grad(
        head, lambda: fused_linear_divergences(hidden, head, targets, chunk=chunk)[0]
    )()[1]
    for name, expected in gradient.items():
        close(trained[name], float64(expected), 3e-6)


@pytest.mark.parametrize("differentiable", [False, True])
def test_each_token_s_values(differentiable):
    hidden, head, targets = several()
    total, values = fused_linear_divergences(
        hidden, head, targets, chunk=4, differentiable=differentiable
    )
    weights = np.stack([float64(t.weights) for t in targets], axis=-1)
    assert values.shape == weights.shape and values.dtype == mx.float32
    assert total.item() == pytest.approx((float64(values) * weights).sum(), rel=1e-5)
    for place, target in enumerate(targets):
        alone = replace(target, weights=mx.ones((23,)))
        value = fused_linear_divergences(hidden, head, [alone])[0].item()
        assert value == pytest.approx(float64(values)[:, place].sum(), rel=1e-5)
    flat = mx.grad(lambda x: fused_linear_divergences(x, head, targets)[1].sum())(hidden)
    assert not np.array(flat).any()


def test_small_weights_survive_float16():
    """A loss's share of a token in a long update is far below what float16 can hold."""
    hidden, head, targets = several(dtype=mx.float16)
    head.set_dtype(mx.float16)
    small = [replace(t, weights=t.weights * 1e-6) for t in targets]

    def grad(chosen, scale):
        return mx.grad(lambda x: scale * fused_linear_divergences(x, head, chosen)[0])(hidden)

    close(grad(small, 1e6), float64(grad(targets, 1.0)), 2e-3)


def test_a_target_s_mask_is_its_own():
    """Under one target's mask stands NaN; another target's divergence there is not touched."""
    hidden, head, targets = several()
    cross_entropy, jsd = targets[0], targets[1]
    mask = mx.arange(23) % 3 != 0
    weights = mx.where(mask, jsd.weights, 0)
    clean = [cross_entropy, replace(jsd, weights=weights)]
    teacher = mx.where(mask[:, None], jsd.outputs, mx.nan)
    masked = replace(jsd, outputs=teacher, weights=weights, mask=mask)
    expected = mx.value_and_grad(lambda x: fused_linear_divergences(x, head, clean)[0])(hidden)
    found = mx.value_and_grad(
        lambda x: fused_linear_divergences(x, head, [cross_entropy, masked])[0]
    )(hidden)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    close(found[1], float64(expected[1]), 1e-6)


# --- what a top k leaves out ---


@pytest.mark.parametrize("form", ["linear", "4 bits, groups of 64"])
def test_teacher_top_k_is_of_its_logits(form, monkeypatch):
    monkeypatch.setattr("mlx_fd.losses.chunks.LOGIT_BUDGET", 4 * 301 * 20)
    _, (theirs, weight, bias) = models(301, 64, teacher=form)
    hidden = numbers(5, 17, 128)
    found = teacher_top_k(mx.array(hidden), theirs, k=9, temperature=2.5, vocab=290)
    logits = (hidden.astype(float) @ weight.T + (0 if bias is None else bias))[:, :290]
    values, indices, _ = top_k_reference(logits, 9)
    assert np.array_equal(np.array(found.indices), indices)
    close(found.values, values, 1e-5)
    close(found.log_sum_exp, np.logaddexp.reduce(logits / 2.5, axis=-1), 1e-5)
    every = teacher_top_k(mx.array(hidden), theirs, k=999, temperature=1.0, vocab=290)
    assert every.indices.shape == (17, 290)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["forward", "jsd"]),
    st.sampled_from([0.2, 2.0, 20.0]),
    st.integers(1, 39),
    st.sampled_from([0.7, 1.0, 3.0]),
)
def test_what_a_top_k_misses_is_bounded(seed, kind, scale, k, temperature):
    vocab = 40
    head = nn.Linear(vocab, vocab, bias=False)
    head.weight = mx.eye(vocab)
    student, teacher = (mx.array(numbers(seed + i, 6, vocab) * scale) for i in range(2))
    top_k = teacher_top_k(teacher, head, k=k, temperature=temperature, vocab=vocab)
    shared = {"kind": kind, "temperature": temperature, "vocab": vocab, "beta": 0.3}
    bound, tail = top_k_gap(student, head, top_k, **shared)

    def values(target, of):
        full = Target(target, of, mx.ones((6,)), kind, temperature, vocab, 0.3)
        return float64(fused_linear_divergences(student, head, [full])[1][:, 0])

    whole, coarse = values(teacher, head), values(top_k, None)
    rounding = 1e-5 * np.abs(whole) + 1e-4 * temperature**2
    assert (coarse <= whole + rounding).all()
    assert (whole <= coarse + float64(bound) + rounding).all()
    p = np.exp(float64(teacher) / temperature - float64(top_k.log_sum_exp)[:, None])
    expected = np.sort(p, axis=-1)[:, : vocab - k].sum(axis=-1)
    np.testing.assert_allclose(float64(tail), expected, rtol=1e-3, atol=2e-5)


def test_what_a_top_k_misses_by_hand():
    """Teacher (1/2, 1/4, 1/8, 1/8), student (1/2, 1/4, 3/16, 1/16), k = 2: 1/4 KL(1/2 || 3/4)."""
    head = nn.Linear(4, 4, bias=False)
    head.weight = mx.eye(4)
    teacher = mx.log(mx.array([[0.5, 0.25, 0.125, 0.125]]))
    student = mx.log(mx.array([[0.5, 0.25, 0.1875, 0.0625]]))
    shared = {"temperature": 1.0, "vocab": 4}
    top_k = teacher_top_k(teacher, head, k=2, **shared)
    bound, tail = top_k_gap(student, head, top_k, kind="forward", **shared)
    assert tail.item() == pytest.approx(0.25)
    # p_k / p_t = 1 and the least likely of the tail has a quarter of it.
    assert bound.item() == pytest.approx(0.25 * math.log(4), rel=1e-5)
    assert 0.25 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) < bound.item()
    bound, _ = top_k_gap(student, head, top_k, kind="jsd", **shared)
    assert bound.item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    bound, _ = top_k_gap(student, head, top_k, kind="reverse", **shared)
    assert bound.item() == math.inf
    every = teacher_top_k(teacher, head, k=4, **shared)
    assert top_k_gap(student, head, every, kind="forward", **shared)[0].item() == 0
