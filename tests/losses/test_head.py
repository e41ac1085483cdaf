"""Logits as models make them: scaled, capped, with a bias, or by the model's own function."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import cohere, falcon_h1, gemma2, gemma4_text, granite, llama, minicpm
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_fd.losses import divergence
from mlx_fd.losses.comparison import compare_distributions, token_log_probabilities, top_k_gap
from mlx_fd.losses.divergence import Target, fused_linear_divergence, fused_linear_divergences
from mlx_fd.losses.head import head_rows, logit_head
from mlx_fd.losses.kernel_checks import divergence_reference, float64
from mlx_fd.losses.teacher import TopK, one_hot, teacher_at, teacher_top_k
from mlx_fd.models.backend import Backend
from mlx_fd.models.logit_transform import DenseLogits, LinearLogits, LogitTransform
from mlx_fd.models.view import find_view
from support.loss_numbers import numbers

N, VOCAB, WIDTH = 9, 61, 32
KINDS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}
TRANSFORMS = {
    "identity": LogitTransform(),
    "divided": LogitTransform(1 / 8),
    "multiplied": LogitTransform(2.5),
    "capped": LogitTransform(1.0, 4.0),
    "scaled and capped": LogitTransform(1.5, 6.0),
}
PAIRS = [
    ("divided", "identity"),
    ("identity", "capped"),
    ("capped", "divided"),
    ("scaled and capped", "scaled and capped"),
]
WEIGHTS = np.array([1, 0, 0.5, 1, 2, 0, 1, 1, 3])


def linear(seed, rows, width, bias=True):
    module = nn.Linear(width, rows, bias=bias)
    module.weight = mx.array(numbers(seed, rows, width, scale=0.6))
    if bias:
        module.bias = mx.array(numbers(seed + 1, rows))
    return module


def quantized(seed, rows, width):
    return nn.QuantizedLinear.from_linear(linear(seed, rows, width), 32, 4)


def as_models_do(source, hidden):
    """The logits in plain MLX operations, which MLX differentiates."""
    if isinstance(source, DenseLogits):
        return source.call(hidden)
    transform, scaled = source.transform, source.module(hidden) * source.transform.scale
    if transform.soft_cap is None:
        return scaled
    return mx.tanh(scaled / transform.soft_cap) * transform.soft_cap


def pair(student, teacher, dtype=mx.float32):
    """Two heads, and final hidden states for each."""
    ours = LinearLogits(linear(1, VOCAB + 3, WIDTH), TRANSFORMS[student])
    theirs = LinearLogits(linear(3, VOCAB + 7, 2 * WIDTH), TRANSFORMS[teacher])
    for source in (ours, theirs):
        source.module.set_dtype(dtype)
    hidden = mx.array(numbers(5, N, WIDTH, scale=1.0)).astype(dtype)
    return ours, theirs, hidden, mx.array(numbers(6, N, 2 * WIDTH, scale=0.5)).astype(dtype)


def engine(source, hidden, targets, chunk=None):
    return fused_linear_divergences(hidden, source, targets, chunk=chunk)[0]


IDENTITY = nn.Linear(VOCAB + 7, VOCAB + 7, bias=False)
IDENTITY.weight = mx.eye(VOCAB + 7)


def of_logits(source, hidden, targets):
    """The engine on logits that were made outside of it, where MLX differentiates them."""
    logits = as_models_do(source, hidden)
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    head.weight = mx.eye(logits.shape[1])
    plain = [
        target
        if target.head is None
        else replace(target, outputs=as_models_do(target.head, target.outputs), head=IDENTITY)
        for target in targets
    ]
    return engine(head, logits, plain)


def same(found, expected, tolerance=1e-5):
    (value, grad), (expected_value, expected_grad) = found, expected
    assert float(value) == pytest.approx(float(expected_value), rel=tolerance)
    near(grad, expected_grad, tolerance)


def near(found, expected, tolerance=1e-5):
    found, expected = float64(found), float64(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


# ---- value and gradient ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_loss_of_transformed_logits_in_float64(student, teacher, kind, monkeypatch):
    """In chunks of tokens, and as many rows at a time as a tiny cache holds."""
    monkeypatch.setattr(divergence, "_CACHE_BYTES", 2 * 4 * VOCAB)
    ours, theirs, hidden, states = pair(student, teacher)
    target = Target.teacher(
        states,
        theirs,
        kind=kind,
        temperature=2.0,
        mask=mx.array(WEIGHTS),
        vocab=VOCAB,
        beta=KINDS["jsd"],
    )
    weight = float64(ours.module.weight)[:VOCAB]
    products = [
        (float64(of) @ float64(source.module.weight).T + float64(source.module.bias))[:, :VOCAB]
        for source, of in ((ours, hidden), (theirs, states))
    ]
    values, grad = divergence_reference(
        *products,
        beta=KINDS[kind],
        temperature=2.0,
        transforms=(ours.transform, theirs.transform),
    )
    by_product = WEIGHTS[:, None] * grad
    for chunk in (None, 1, 4):
        value, found = mx.value_and_grad(lambda x, c=chunk: engine(ours, x, [target], c))(hidden)
        assert value.item() == pytest.approx(values @ WEIGHTS, rel=1e-5)
        near(found, mx.array(by_product @ weight))


TARGETS = {
    "clipped": {"clip": 0.05},
    "standardised": {"standardize": True},
    "standardised and clipped": {"standardize": True, "clip": 0.05},
}


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_divergence_sees_the_models_logits(student, teacher, kind, options):
    ours, theirs, hidden, states = pair(student, teacher)
    targets = [
        Target.teacher(states, theirs, kind=kind, temperature=1.5, vocab=VOCAB, **options),
    ]
    found = mx.value_and_grad(lambda x: engine(ours, x, targets, 4))(hidden)
    same(found, mx.value_and_grad(lambda x: of_logits(ours, x, targets))(hidden), 2e-5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_top_k_is_of_the_teachers_logits(student, teacher, kind, tail):
    ours, theirs, hidden, states = pair(student, teacher)
    top_k = teacher_top_k(states, theirs, k=6, temperature=1.5, vocab=VOCAB)
    logits = float64(as_models_do(theirs, states))[:, :VOCAB]
    likeliest = np.argsort(-logits, axis=-1)[:, :6]
    assert np.array_equal(np.array(top_k.indices), likeliest)
    near(top_k.values, mx.array(np.take_along_axis(logits, likeliest, axis=-1)))
    near(top_k.log_sum_exp, mx.array(np.logaddexp.reduce(logits / 1.5, axis=-1)))
    at = teacher_at(states, theirs, top_k.indices, temperature=1.5, vocab=VOCAB)
    near(at.values, top_k.values)
    near(at.log_sum_exp, top_k.log_sum_exp)
    targets = [
        Target.teacher(top_k, kind=kind, temperature=1.5, vocab=VOCAB, tail=tail),
        Target.tokens(mx.arange(N)),
    ]
    found = mx.value_and_grad(lambda x: engine(ours, x, targets, 4))(hidden)
    same(found, mx.value_and_grad(lambda x: of_logits(ours, x, targets))(hidden), 2e-5)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_two_models_are_compared_by_their_logits(student, teacher):
    ours, theirs, hidden, states = pair(student, teacher)
    tokens, how = mx.arange(N), {"temperature": 1.5, "vocab": VOCAB}
    found = compare_distributions((hidden, ours), (states, theirs), tokens, k=4, **how)
    rows = []
    for head, values in ((ours, hidden), (theirs, states)):
        logits = float64(as_models_do(head, values))[:, :VOCAB] / 1.5
        rows.append(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    q, p = rows
    near(found.logprobs, mx.array(q[np.arange(N), np.arange(N)]))
    near(found.teacher, mx.array(p[np.arange(N), np.arange(N)]))
    near(found.entropy, mx.array(-(np.exp(q) * q).sum(axis=-1)))
    near(found.reverse_kl, mx.array((np.exp(q) * (q - p)).sum(axis=-1)))
    likeliest = [np.argsort(-logits, axis=-1)[:, :4] for logits in rows]
    shared = [len(set(a) & set(b)) / 4 for a, b in zip(*likeliest, strict=True)]
    assert np.array(found.overlap).tolist() == shared and len(set(shared)) > 1
    same_model = compare_distributions((hidden, ours), (hidden, ours), tokens, k=4, **how)
    assert float(same_model.overlap.min()) == 1 and float(same_model.reverse_kl.max()) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_log_probabilities_and_gaps_are_of_the_models_logits(transform):
    source = LinearLogits(linear(1, VOCAB + 3, WIDTH), transform)
    hidden, tokens = mx.array(numbers(5, N, WIDTH, scale=1.0)), mx.arange(N)
    how = {"temperature": 1.5, "vocab": VOCAB}
    logprobs, entropies = token_log_probabilities(hidden, source, tokens, **how)
    rows = float64(as_models_do(source, hidden))[:, :VOCAB] / 1.5
    rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    near(logprobs, mx.array(rows[np.arange(N), np.arange(N)]))
    near(entropies, mx.array(-(np.exp(rows) * rows).sum(axis=-1)))
    teacher = TopK(mx.zeros((N, 2)), mx.array([[3, 7]] * N), mx.full((N,), 1.2))
    plain = nn.Linear(VOCAB, VOCAB, bias=False)
    plain.weight = mx.eye(VOCAB)
    logits = as_models_do(source, hidden)[:, :VOCAB]
    for kind in ("forward", "jsd"):
        found = top_k_gap(hidden, source, teacher, kind=kind, **how)
        expected = top_k_gap(logits, plain, teacher, kind=kind, **how)
        for one, two in zip(found, expected, strict=True):
            near(one, two)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transformed_head_that_trains(transform):
    source = LinearLogits(linear(1, VOCAB, WIDTH), transform)
    hidden, tokens = mx.array(numbers(5, N, WIDTH, scale=1.0)), mx.arange(N)

    def cross_entropy():
        logits = as_models_do(source, hidden)
        return nn.losses.cross_entropy(logits, tokens, reduction="sum")

    def fused():
        return fused_linear_divergence(hidden, source, Target.tokens(tokens), chunk=4)[0]

    value, grad = nn.value_and_grad(source.module, fused)()
    expected, expected_grad = nn.value_and_grad(source.module, cross_entropy)()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sorted(grad) == ["bias", "weight"]
    for name in grad:
        near(grad[name], expected_grad[name])


@pytest.mark.parametrize("scale", [1 / 8, 0.007])
def test_a_small_scale_leaves_float16_its_gradient(scale, monkeypatch):
    """By the product a gradient is as much smaller, and float16 has nothing below 6e-8."""
    monkeypatch.setattr("mlx_fd.losses.head.backend", lambda: Backend("cuda", None, ""))
    module = linear(1, 4096, WIDTH, bias=False)
    module.set_dtype(mx.float16)
    source = LinearLogits(module, LogitTransform(scale))
    hidden = mx.array(numbers(5, N, WIDTH, scale=1.0)).astype(mx.float16)
    head = logit_head(source, 4096)
    grad = numbers(7, N, 4096, scale=scale * 1e-8)
    found = head.input_gradient(mx.array(grad), hidden)
    near(found, mx.array(grad.astype(np.float64) @ float64(module.weight)), 1e-2)


def test_a_quantised_head_is_transformed_too():
    source = LinearLogits(quantized(1, VOCAB, WIDTH), TRANSFORMS["scaled and capped"])
    hidden, target = mx.array(numbers(5, N, WIDTH, scale=1.0)), Target.tokens(mx.arange(N))
    found = mx.value_and_grad(lambda x: engine(source, x, [target]))(hidden)
    same(found, mx.value_and_grad(lambda x: of_logits(source, x, [target]))(hidden), 1e-4)


# ---- logits that only the model can make ----


def mixed(seed, width):
    """No linear head: two of them, and the soft maximum of both."""
    one, two = linear(seed, VOCAB + 7, width), linear(seed + 9, VOCAB + 7, width)
    return DenseLogits(lambda hidden: mx.logaddexp(one(hidden), two(mx.sin(hidden))), VOCAB + 7)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_models_own_function(kind, dtype):
    ours, theirs = mixed(1, WIDTH), mixed(3, 2 * WIDTH)
    hidden = mx.array(numbers(5, N, WIDTH, scale=1.0)).astype(dtype)
    states = mx.array(numbers(6, N, 2 * WIDTH, scale=0.5)).astype(dtype)
    targets = [
        Target.teacher(
            states, theirs, kind=kind, temperature=2.0, mask=mx.array(WEIGHTS), vocab=VOCAB
        ),
        Target(one_hot(mx.arange(N)), None, mx.ones((N,)), "forward", 1.0, head_rows(ours)),
    ]
    expected = mx.value_and_grad(lambda x: of_logits(ours, x, targets))(hidden)
    assert head_rows(ours) == VOCAB + 7
    for chunk in (None, 1, 4):
        found = mx.value_and_grad(lambda x, c=chunk: engine(ours, x, targets, c))(hidden)
        assert found[1].dtype == dtype
        same(found, expected, 1e-5 if dtype == mx.float32 else 1e-2)


def test_what_is_asked_of_a_models_own_function():
    source = mixed(1, WIDTH)
    hidden = mx.array(numbers(5, N, WIDTH, scale=1.0))
    logits = float64(source.call(hidden))[:, :VOCAB]
    rows = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    how = {"temperature": 1.0, "vocab": VOCAB}
    logprobs, _ = token_log_probabilities(hidden, source, mx.arange(N), **how)
    near(logprobs, mx.array(rows[np.arange(N), np.arange(N)]))
    assert np.array_equal(
        np.array(teacher_top_k(hidden, source, k=5, **how).indices),
        np.argsort(-logits, axis=-1)[:, :5],
    )
    with pytest.raises(ValueError, match="vocab = 69, but the head has 68 rows"):
        logit_head(source, VOCAB + 8)


# ---- models ----


SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
}
MODELS = {
    "granite": (
        granite,
        {
            "model_type": "granite",
            "rms_norm_eps": 1e-5,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "max_position_embeddings": 100,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 10000.0,
        },
        LogitTransform(1 / 8),
    ),
    "gemma2": (
        gemma2,
        {
            "model_type": "gemma2",
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
        },
        LogitTransform(1.0, 3.0),
    ),
    "gemma4": (
        gemma4_text,
        {
            "model_type": "gemma4_text",
            "head_dim": 8,
            "global_head_dim": 8,
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": 90,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        LogitTransform(1.0, 3.0),
    ),
    "falcon_h1": (
        falcon_h1,
        {
            "model_type": "falcon_h1",
            "head_dim": 8,
            "mamba_d_ssm": 16,
            "mamba_d_state": 8,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "tie_word_embeddings": True,
        },
        LogitTransform(0.0390625 / 5.656854249492381),
    ),
    "minicpm": (
        minicpm,
        {
            "model_type": "minicpm",
            "dim_model_base": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "tie_word_embeddings": False,
        },
        LogitTransform(8 / 32),
    ),
    "cohere": (cohere, {"model_type": "cohere", "logit_scale": 0.0625}, LogitTransform(0.0625)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_models(name):
    """Logits, and value and gradient of a divergence, against what the model itself makes."""
    module, config, transform = MODELS[name]
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({**SHAPE, **config}))
    tokens = mx.array([[5, 17, 3, 88, 42, 7, 0, 61]])
    final = model.model(tokens)[0]
    tied = "lm_head" not in model
    source = LinearLogits(model.model.embed_tokens if tied else model.lm_head, transform)
    logits = model(tokens)[0]
    near(logit_head(source, 90).logits(final), logits, 1e-5)
    # Of the model itself there is nothing to learn; the identity would have told another.
    other = LinearLogits(linear(1, 90, WIDTH), LogitTransform(0.7))
    itself = Target.teacher(final, source, vocab=90)
    near_none = fused_linear_divergence(final, source, itself)[0]
    plain = Target.teacher(logits, _eye(90), vocab=90)
    assert abs(float(near_none)) < 1e-4
    assert abs(float(fused_linear_divergence(final, source, plain)[0])) < 1e-4
    hidden = mx.array(numbers(5, len(final), WIDTH, scale=1.0))
    found = mx.value_and_grad(lambda x: engine(other, x, [itself]))(hidden)
    expected = mx.value_and_grad(lambda x: engine(other, x, [plain]))(hidden)
    same(found, expected, 1e-4)
    assert math.isfinite(float(found[0]))


def _eye(size):
    head = nn.Linear(size, size, bias=False)
    head.weight = mx.eye(size)
    return head


def test_a_model_whose_logits_are_not_understood_learns_from_its_own():
    """The gradient by LoRA below the head, where the model's own function makes the logits."""
    mx.random.seed(0)
    config = {**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

    class Bent(llama.Model):
        def __call__(self, *args, **kwargs):
            logits = super().__call__(*args, **kwargs)
            return logits * mx.abs(logits)

    model = Bent(llama.ModelArgs.from_dict(config))
    model.lm_head.weight = mx.array(numbers(1, 90, WIDTH, scale=0.5))
    view = find_view(model)
    assert isinstance(view.head, DenseLogits)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    tokens = mx.array([[5, 17, 3, 88], [42, 7, 1, 61]])

    def whole(trained):
        return nn.losses.cross_entropy(trained(tokens[:, :-1]), tokens[:, 1:], reduction="sum")

    def fused(_):
        final = view.forward(tokens[:, :-1]).final
        return fused_linear_divergence(final, view.head, Target.tokens(tokens[:, 1:]), chunk=4)[0]

    expected, expected_grad = nn.value_and_grad(model, whole)(model)
    found, grad = nn.value_and_grad(model, fused)(model)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_grad = dict(tree_flatten(expected_grad))
    for name, array in tree_flatten(grad):
        wanted = float64(expected_grad[name])
        np.testing.assert_allclose(float64(array), wanted, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(np.abs(float64(array)).max() > 1e-3 for array in expected_grad.values())
