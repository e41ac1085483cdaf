"""The losses against hand-worked numbers, float64 twins and central differences."""

import math
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fd.losses.hidden import aligned_layers, pool
from support import reference_losses as reference
from support.dense_losses import language_model_loss, logit_loss
from support.loss_numbers import (
    as_type,
    check_batch_is_its_parts,
    check_masked_places_poison_nothing,
    check_nothing_valid_gives_zero,
    mean,
    numbers,
    pair,
    same_gradient,
    some_mask,
)
from support.summed_losses import hidden_alignment_loss, score_loss

KLS = ("forward", "reverse", "jsd")
SHAPES = [(1, 1, 2), (1, 5, 7), (3, 1, 33), (2, 7, 31), (4, 3, 101)]
DTYPES = {"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5}


# --- mean ---


def test_mean_of_nothing_has_no_gradient():
    def loss(logits):
        return mean(*language_model_loss(logits, mx.zeros((1, 2), mx.int32), mx.zeros((1, 2))))

    value, grad = mx.value_and_grad(loss)(mx.array(numbers(0, 1, 2, 3)))
    assert value.item() == 0
    assert not np.array(grad).any()


# --- language model ---


def test_language_model_by_hand():
    # p = (1/2, 1/4, 1/4): targets 0 and 2 cost ln 2 and ln 4; the third position is masked.
    logits = mx.log(mx.array([[[0.5, 0.25, 0.25]] * 3]))
    total, count = pair(
        language_model_loss(logits, mx.array([[0, 2, 1]]), mx.array([[1.0, 1.0, 0.0]]))
    )
    assert total == pytest.approx(3 * math.log(2), rel=1e-6)
    assert count == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_language_model_against_twin(shape, dtype):
    logits, exact = as_type(numbers(1, *shape), dtype)
    targets = np.random.default_rng(2).integers(0, shape[-1], shape[:2])
    mask = some_mask(3, *shape[:2])
    result = pair(language_model_loss(logits, mx.array(targets), mx.array(mask)))
    assert result == pytest.approx(
        reference.language_model_loss(exact, targets, mask), rel=DTYPES[dtype]
    )


def test_padded_vocabulary_takes_part():
    narrow = mx.zeros((1, 1, 4))
    wide = mx.zeros((1, 1, 8))
    one = mx.ones((1, 1))
    target = mx.array([[3]])
    assert language_model_loss(narrow, target, one)[0].item() == pytest.approx(math.log(4))
    assert language_model_loss(wide, target, one)[0].item() == pytest.approx(math.log(8))


def test_language_model_gradient():
    logits = numbers(4, 2, 3, 5)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    mask = np.array([[1, 0, 1], [1, 1, 0]])
    same_gradient(
        lambda x: language_model_loss(x, mx.array(targets), mx.array(mask)),
        lambda x: reference.language_model_loss(x, targets, mask),
        logits,
    )
    # And in closed form: softmax minus one-hot where the mask is 1.
    ours = np.array(
        mx.grad(lambda x: language_model_loss(x, mx.array(targets), mx.array(mask))[0])(
            mx.array(logits)
        )
    )
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = (p - np.eye(5)[targets]) * mask[..., None]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


# --- hidden alignment ---


@given(st.integers(1, 80), st.integers(1, 200))
def test_aligned_layers_are_the_floor_of_the_line(n_student, n_teacher):
    picks = aligned_layers(n_student, n_teacher)
    if n_student == 1:
        assert picks == [0]
    else:
        step = Fraction(n_teacher - 1, n_student - 1)
        assert picks == [math.floor(i * step) for i in range(n_student)]
        assert picks[-1] == n_teacher - 1
    assert picks == sorted(picks)


def test_aligned_layers_of_equals_is_each_its_own():
    assert aligned_layers(5, 5) == [0, 1, 2, 3, 4]
    assert aligned_layers(29, 29) == list(range(29))
    assert aligned_layers(3, 29) == [0, 14, 28]


def test_pool_by_hand():
    hidden = mx.array([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[1.0, 1.0]] * 3])
    mask = mx.array([[1, 1, 0], [0, 0, 0]])
    assert pool(hidden, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_hidden_by_hand():
    # Cosines 1, 0 and -1 on three layers: (0 + 1 + 2) / 3.
    student = [mx.array([[[2.0, 0.0]]])] * 3
    teacher = [mx.array([[[5.0, 0.0]]]), mx.array([[[0.0, 1.0]]]), mx.array([[[-1.0, 0.0]]])]
    total, count = pair(hidden_alignment_loss(student, teacher, mx.ones((1, 1)), None))
    assert (total, count) == (pytest.approx(1.0), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_student", "n_teacher"), [(1, 1), (3, 3), (3, 8), (5, 2)])
@pytest.mark.parametrize("pooled", [False, True])
def test_hidden_against_twin(dtype, n_student, n_teacher, pooled):
    batch, tokens, narrow, wide = 3, 5, 4, 6
    mask = some_mask(0, batch, tokens)
    mask[1] = False  # a sample without a valid position
    weight = numbers(1, wide, narrow)
    bias = numbers(2, wide)
    ours = [as_type(numbers(10 + i, batch, tokens, narrow), dtype) for i in range(n_student)]
    theirs = [as_type(numbers(50 + i, batch, tokens, wide), dtype) for i in range(n_teacher)]
    if pooled:
        theirs = [(pool(t, mx.array(mask)), reference.pool(e, mask)) for t, e in theirs]
    result = pair(
        hidden_alignment_loss(
            [s for s, _ in ours],
            [t for t, _ in theirs],
            mx.array(mask),
            lambda x: x @ mx.array(weight).T + mx.array(bias),
        )
    )
    expected = reference.hidden_alignment_loss(
        [s for _, s in ours], [t for _, t in theirs], mask, lambda x: weight @ x + bias
    )
    assert expected[1] == 2
    assert result == pytest.approx(expected, rel=1e-5)


def test_hidden_is_a_cosine_whatever_the_scale():
    student, teacher = mx.array(numbers(1, 2, 3, 4)), mx.array(numbers(2, 2, 3, 4))
    mask = mx.ones((2, 3))
    base = pair(hidden_alignment_loss([student], [teacher], mask, None))
    for scale in (1e-3, 1e4):
        scaled = hidden_alignment_loss([student * scale], [teacher / scale], mask, None)
        assert pair(scaled) == pytest.approx(base, rel=1e-4)
    assert pair(hidden_alignment_loss([student], [student], mask, None))[0] == pytest.approx(
        0, abs=1e-6
    )
    # The projection comes before the normalisation, so its scale cancels too.
    tripled = hidden_alignment_loss([student], [teacher], mask, lambda x: 3 * x)
    assert pair(tripled) == pytest.approx(base, rel=1e-5)


def test_hidden_gradients_into_states_and_projection():
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
    states, teacher = numbers(1, 3, 3, 2), numbers(2, 3, 3, 4)
    weight = numbers(3, 4, 2)
    same_gradient(
        lambda x: hidden_alignment_loss(
            [x, 2 * x[..., ::-1]],
            [mx.array(teacher)] * 2,
            mx.array(mask),
            lambda h: h @ mx.array(weight).T,
        ),
        lambda x: reference.hidden_alignment_loss(
            [x, 2 * x[..., ::-1]], [teacher] * 2, mask, lambda h: weight @ h
        ),
        states,
    )
    same_gradient(
        lambda w: hidden_alignment_loss(
            [mx.array(states)], [mx.array(teacher)], mx.array(mask), lambda h: h @ w.T
        ),
        lambda w: reference.hidden_alignment_loss([states], [teacher], mask, lambda h: w @ h),
        weight,
    )


def test_a_projection_that_starts_at_zero_has_a_finite_gradient():
    def loss(weight):
        states = [mx.array(numbers(1, 2, 3, 4))]
        teacher = [mx.array(numbers(2, 2, 3, 4))]
        return hidden_alignment_loss(states, teacher, mx.ones((2, 3)), lambda h: h @ weight)[0]

    value, grad = mx.value_and_grad(loss)(mx.zeros((4, 4)))
    assert value.item() == pytest.approx(2.0)
    assert np.isfinite(np.array(grad)).all()


def test_hidden_without_layers_is_an_error():
    with pytest.raises(ValueError, match="at least one layer"):
        hidden_alignment_loss([], [mx.zeros((1, 1, 2))], mx.ones((1, 1)), None)


# --- score ---


def test_score_by_hand():
    predicted, target = mx.array([0.5, -0.5, 0.9]), mx.array([1.0, -0.5, math.nan])
    assert pair(score_loss(predicted, target, mx.array([1, 1, 0]))) == (0.25, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_against_twin_and_gradient(dtype):
    predicted, exact = as_type(np.tanh(numbers(1, 9)), dtype)
    target, mask = np.tanh(numbers(2, 9)), some_mask(3, 9)
    target[~mask] = np.nan
    result = pair(score_loss(predicted, mx.array(target), mx.array(mask)))
    assert result == pytest.approx(reference.score_loss(exact, target, mask), rel=1e-5)
    same_gradient(
        lambda x: score_loss(x, mx.array(target), mx.array(mask)),
        lambda x: reference.score_loss(x, target, mask),
        exact.astype(np.float32),
    )


# --- logit ---


def logits_of(*probabilities):
    return mx.log(mx.array([[list(probabilities)]]))


def diverge(student, teacher, kl, temperature=1.0, standardize=False, mask=None, vocab=None):
    return logit_loss(
        student,
        teacher,
        mx.ones(student.shape[:2]) if mask is None else mask,
        kl=kl,
        temperature=temperature,
        vocab=vocab or min(student.shape[-1], teacher.shape[-1]),
        standardize=standardize,
    )


def test_logit_by_hand():
    student, teacher = logits_of(0.5, 0.5), logits_of(0.75, 0.25)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = (0.625, 0.375)
    jsd = 0.5 * (
        0.75 * math.log(0.75 / middle[0])
        + 0.25 * math.log(0.25 / middle[1])
        + 0.5 * math.log(0.5 / middle[0])
        + 0.5 * math.log(0.5 / middle[1])
    )
    for kl, value in (("forward", forward), ("reverse", reverse), ("jsd", jsd)):
        assert pair(diverge(student, teacher, kl)) == (pytest.approx(value, rel=1e-5), 1)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("standardize", [False, True])
def test_logit_against_twin(kl, shape, standardize):
    """The teacher's vocabulary is padded further than the student's, and both are cut."""
    batch, tokens, vocab = shape
    mask = some_mask(1, batch, tokens)
    for dtype, tolerance in DTYPES.items():
        student, student64 = as_type(numbers(2, batch, tokens, vocab + 3), dtype)
        teacher, teacher64 = as_type(numbers(3, batch, tokens, vocab + 10), dtype)
        options = {
            "kl": kl, "temperature": 1.7, "vocab": vocab, "standardize": standardize,
        }  # fmt: skip
        result = pair(logit_loss(student, teacher, mx.array(mask), **options))
        expected = reference.logit_loss(student64, teacher64, mask, **options)
        # With two tokens, standardised rows are (1, -1) or (-1, 1), so both may agree exactly.
        assert result == pytest.approx(expected, rel=5 * tolerance, abs=1e-5)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("standardize", [False, True])
def test_logit_gradient(kl, standardize):
    student, teacher = numbers(1, 2, 3, 6), numbers(2, 2, 3, 8)
    mask = np.array([[1, 0, 1], [1, 1, 0]])
    options = {"kl": kl, "temperature": 2.0, "vocab": 5, "standardize": standardize}
    same_gradient(
        lambda x: logit_loss(x, mx.array(teacher), mx.array(mask), **options),
        lambda x: reference.logit_loss(x, teacher, mask, **options),
        student,
    )


def test_forward_gradient_in_closed_form():
    """d/ds of T^2 KL(p || q) is T (q - p), nothing beyond the shared vocabulary."""
    student, teacher = numbers(1, 1, 2, 6), numbers(2, 1, 2, 5)
    ours = np.array(
        mx.grad(lambda x: diverge(x, mx.array(teacher), "forward", temperature=3.0, vocab=5)[0])(
            mx.array(student)
        )
    )

    def soft(x):
        e = np.exp(x[..., :5].astype(np.float64) / 3)
        return e / e.sum(-1, keepdims=True)

    np.testing.assert_allclose(ours[..., :5], 3 * (soft(student) - soft(teacher)), atol=1e-6)
    assert not ours[..., 5].any()


@pytest.mark.parametrize("kl", KLS)
def test_no_gradient_reaches_the_teacher(kl):
    student, teacher = mx.array(numbers(1, 1, 2, 5)), mx.array(numbers(2, 1, 2, 5))
    grad = mx.grad(lambda t: diverge(student, t, kl)[0])(teacher)
    assert not np.array(grad).any()
    layers = mx.array(numbers(3, 1, 2, 5))
    grad = mx.grad(lambda t: hidden_alignment_loss([student], [t], mx.ones((1, 2)), None)[0])
    assert not np.array(grad(layers)).any()


def test_temperature_squared():
    student, teacher = mx.array(numbers(1, 2, 3, 9)), mx.array(numbers(2, 2, 3, 9))
    for kl in KLS:
        at_one = diverge(student / 4, teacher / 4, kl, temperature=1.0)[0].item()
        at_four = diverge(student, teacher, kl, temperature=4.0)[0].item()
        assert at_four == pytest.approx(16 * at_one, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KLS),
    st.sampled_from([0.1, 1.0, 10.0, 1000.0]),
    st.integers(2, 40),
    st.booleans(),
)
def test_divergences_are_not_negative_and_zero_only_for_equals(seed, kl, scale, vocab, standardize):
    student, teacher = (mx.array(numbers(seed + i, 1, 1, vocab, scale=scale)) for i in (0, 1))
    value = diverge(student, teacher, kl, standardize=standardize)[0].item()
    assert value >= -1e-5
    if kl == "jsd":
        assert value <= math.log(2) + 1e-5
    assert diverge(student, student, kl, standardize=standardize)[0].item() == pytest.approx(
        0, abs=1e-5
    )
    # A constant added to every logit changes nothing.
    moved = diverge(student, teacher + 3.0, kl, standardize=standardize)[0].item()
    assert moved == pytest.approx(value, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("kl", KLS)
def test_different_rows_have_a_positive_divergence(kl):
    student = mx.zeros((1, 1, 5))
    teacher = mx.array([[[0.0, 0.0, 0.0, 0.0, 0.1]]])
    assert diverge(student, teacher, kl)[0].item() > 1e-4


@pytest.mark.parametrize("kl", KLS)
def test_standardised_rows_ignore_scale_and_shift(kl):
    student, teacher = mx.array(numbers(1, 1, 3, 8)), mx.array(numbers(2, 1, 3, 8))
    base = diverge(student, teacher, kl, 2.0, True)[0].item()
    assert base > 0.1
    assert diverge(student, 7 * teacher - 5, kl, 2.0, True)[0].item() == pytest.approx(
        base, rel=1e-4
    )
    # A row of equal logits is the uniform distribution, with a finite gradient.
    grad = mx.grad(lambda x: diverge(x, teacher, kl, 2.0, True)[0])(mx.ones((1, 3, 8)))
    assert np.isfinite(np.array(grad)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("standardize", [False, True])
def test_extreme_logits(dtype, kl, standardize):
    signs = np.random.default_rng(0).choice([-1e4, 0.0, 1e4], (2, 3, 11)).astype(np.float32)
    other = np.random.default_rng(1).choice([-1e4, 0.0, 1e4], (2, 3, 11)).astype(np.float32)
    student, student64 = as_type(signs, dtype)
    teacher, teacher64 = as_type(other, dtype)
    ones = np.ones((2, 3))
    options = {"kl": kl, "temperature": 1.0, "vocab": 11, "standardize": standardize}
    value, grad = mx.value_and_grad(lambda x: logit_loss(x, teacher, mx.array(ones), **options)[0])(
        student
    )
    expected = reference.logit_loss(student64, teacher64, ones, **options)[0]
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert np.isfinite(np.array(grad.astype(mx.float32))).all()
    targets = np.zeros((2, 3), np.int64)
    lm, grad = mx.value_and_grad(
        lambda x: language_model_loss(x, mx.array(targets), mx.array(ones))[0]
    )(student)
    assert lm.item() == pytest.approx(
        reference.language_model_loss(student64, targets, ones)[0], rel=1e-5
    )
    assert np.isfinite(np.array(grad.astype(mx.float32))).all()


def test_logit_misuse_is_named():
    rows = mx.zeros((1, 1, 4))
    with pytest.raises(ValueError, match="kl must be"):
        diverge(rows, rows, "backward")
    with pytest.raises(ValueError, match=r"vocab = 5, but the logits are 4 \(student\)"):
        diverge(rows, mx.zeros((1, 1, 6)), "forward", vocab=5)


# --- all of them: masks and batches ---


def every_loss(seed, batch, tokens, vocab=9, width=4):
    """Each loss as a function of (its input, rows): the input, and a function of input and rows."""
    mask = np.random.default_rng(seed).random((batch, tokens)) < 0.5
    mask[0] = True
    mask[-1] = False
    targets = np.random.default_rng(seed + 1).integers(0, vocab, (batch, tokens))
    teacher = numbers(seed + 2, batch, tokens, vocab + 2)
    layers = numbers(seed + 3, batch, tokens, width)
    scores = np.tanh(numbers(seed + 4, batch))
    score_mask = mask[:, 0]
    losses = {
        "lm": (
            numbers(seed + 5, batch, tokens, vocab),
            mask,
            lambda x, r: language_model_loss(x, mx.array(targets[r]), mx.array(mask[r])),
        ),
        "hidden": (
            numbers(seed + 6, batch, tokens, width),
            mask,
            lambda x, r: hidden_alignment_loss([x], [mx.array(layers[r])], mx.array(mask[r]), None),
        ),
        "score": (
            np.tanh(numbers(seed + 7, batch)),
            score_mask,
            lambda x, r: score_loss(x, mx.array(scores[r]), mx.array(score_mask[r])),
        ),
    }
    for kl in KLS:
        for standardize in (False, True):
            losses[f"logit {kl} {standardize}"] = (
                numbers(seed + 8, batch, tokens, vocab + 1),
                mask,
                lambda x, r, kl=kl, standardize=standardize: logit_loss(
                    x,
                    mx.array(teacher[r]),
                    mx.array(mask[r]),
                    kl=kl,
                    temperature=2.0,
                    vocab=vocab,
                    standardize=standardize,
                ),
            )
    return losses


NAMES = list(every_loss(0, 2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_eight_is_four_batches_of_two(name):
    values, _, loss = every_loss(7, 8, 5)[name]
    check_batch_is_its_parts(values, loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_places_poison_nothing(name, poison):
    check_masked_places_poison_nothing(*every_loss(3, 4, 5)[name], poison)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_gives_zero(name):
    values, _, loss = every_loss(5, 3, 2)[name]
    check_nothing_valid_gives_zero(values, loss, slice(2, 3))


@pytest.mark.parametrize("pooled", [False, True])
def test_masked_teacher_and_targets_poison_nothing(pooled):
    mask = np.array([[1, 0, 1], [0, 0, 0]])
    student = numbers(1, 2, 3, 4)
    teacher = numbers(2, 2, 3, 4)
    teacher[mask == 0] = np.nan
    targets = np.array([[0, -100, 3], [-100, 10**6, -1]])
    layers = mx.array(teacher)
    if pooled:
        layers = mx.array([[1.0, 2.0, 3.0, 4.0], [math.nan] * 4])

    def total(x):
        return (
            diverge(x, mx.array(teacher), "forward", mask=mx.array(mask))[0]
            + language_model_loss(x, mx.array(targets), mx.array(mask))[0]
            + hidden_alignment_loss([x], [layers], mx.array(mask), None)[0]
        )

    value, grad = mx.value_and_grad(total)(mx.array(student))
    assert math.isfinite(value.item())
    assert np.isfinite(np.array(grad)).all()
    assert np.array(grad)[mask == 1].any()


@pytest.mark.parametrize("dtype", [mx.bool_, mx.int32, mx.float32])
def test_masks_of_any_type(dtype):
    values, mask, _ = every_loss(9, 3, 4)["lm"]
    targets = mx.zeros((3, 4), mx.int32)
    expected = reference.language_model_loss(values, np.zeros((3, 4), int), mask)
    typed = mx.array(mask).astype(dtype)
    assert pair(language_model_loss(mx.array(values), targets, typed)) == pytest.approx(
        expected, rel=1e-5
    )
