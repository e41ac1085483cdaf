"""Attention weights of any block, against what the model's own attention gives."""

import contextlib
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.errors import UserError
from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.models.attention_taps import LOG_ZERO, log_attention, recorded
from mlx_fd.models.checking import check_attention
from mlx_fd.models.loading import load
from mlx_fd.models.view import block_attention
from support.architectures import WINDOW, make_architecture
from support.summed_losses import attention_matching_loss
from support.tiny import make_model_dir

# Norms of queries and keys, windows that the text runs out of, latents, keys of earlier blocks,
# scales, no positions in some blocks, biases, partly turned heads, one text after the other.
FAMILIES = [
    *("llama", "llama_sliding", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma3_text", "gemma3", "gemma3n", "granite", "smollm3", "phi3", "olmo2", "olmo3"),
    *("deepseek_v2", "exaone4", "glm4", "cohere2", "llama4"),
]
LENGTH = WINDOW + 9


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Of each family a model, loaded when it is asked for."""
    folder, made = tmp_path_factory.mktemp("attention"), {}

    def view(name):
        if name not in made:
            made[name] = load(make_architecture(folder / name, name)).view
        return made[name]

    return view


def some_tokens(batch=2, length=LENGTH, seed=0):
    return mx.array(np.random.default_rng(seed).integers(3, 380, (batch, length)))


@contextlib.contextmanager
def replaced(attention):
    """Something else in place of the attention that mlx-lm's models import from it, by its name."""
    name = "scaled_dot_product_attention"
    modules = [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("mlx_lm.models.") and hasattr(module, name)
    ]
    before = [getattr(module, name) for module in modules]
    for module, fused in zip(modules, before, strict=True):
        setattr(module, name, attention(fused))
    try:
        yield
    finally:
        for module, fused in zip(modules, before, strict=True):
            setattr(module, name, fused)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_times_values_are_what_each_block_attends_with(views, name):
    """At once, and after a prompt that a cache holds: its keys may be those of a window alone."""
    calls = []

    def spy(fused):
        def call(queries, keys, values, *args, **options):
            calls.append((values, fused(queries, keys, values, *args, **options)))
            return calls[-1][1]

        return call

    view, tokens = views(name), some_tokens()
    assert len(block_attention(view.model)) == len(view.blocks)
    cache, begin = make_prompt_cache(view.model), WINDOW + 2
    with replaced(spy):
        whole = view.forward(tokens, attention=True).attention
        if not view.batched:
            whole, calls[:] = view.forward(tokens[:1], attention=True).attention, []
            view.forward(tokens[:1])
        at_once, calls[:] = [*calls], []
        view.forward(tokens[:1, :begin], cache)
        calls.clear()
        rest = view.forward(tokens[:1, begin:], cache, attention=True).attention
    for of_block, (values, fused), (_, after), piece in zip(
        whole, at_once, calls, rest, strict=True
    ):
        log_weights = log_attention(of_block)
        assert log_weights.dtype == mx.float32
        weights = np.array(mx.exp(log_weights))
        assert weights.shape == (len(values), fused.shape[1], LENGTH, LENGTH)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert (weights[..., np.triu(np.ones((LENGTH, LENGTH), bool), 1)] == 0).all()
        heads = np.repeat(np.array(values), fused.shape[1] // values.shape[1], axis=1)
        np.testing.assert_allclose(weights @ heads, np.array(fused), atol=2e-5)
        # The same rows, of the same keys, with a cache; some of them alone.
        rows = np.array(log_attention(piece, keys=LENGTH))
        np.testing.assert_allclose(np.exp(rows[0]), weights[0, :, begin:], atol=2e-5)
        assert after.shape[2] == LENGTH - begin
        two = log_attention(piece, positions=mx.array([[1, 4]]), keys=LENGTH)
        np.testing.assert_allclose(np.exp(two), np.exp(rows[:, :, [1, 4]]), atol=1e-6)
    check_attention(view)


def dense_attention(maps):
    """Attention as its formula is written, which keeps its weights."""

    def call(queries, keys, values, cache, scale, mask, sinks=None):
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (mx.repeat(part, groups, axis=1) for part in (keys, values))
        scores = scale * queries @ keys.swapaxes(-1, -2)
        if isinstance(mask, str):
            mask = mx.tril(mx.ones(scores.shape[-2:], mx.bool_), keys.shape[2] - queries.shape[2])
        if mask is not None:
            bare = mask.dtype == mx.bool_
            scores = mx.where(mask, scores, LOG_ZERO) if bare else scores + mask
        maps.append(mx.softmax(scores, axis=-1))
        return maps[-1] @ values

    return lambda fused: call


def dense_loss(student, teacher, mask):
    """Over the keys that both see, layer by layer, of weights averaged over heads."""
    total = mx.array(0.0)
    for ours, pick in zip(student, aligned_layers(len(student), len(teacher)), strict=True):
        a, b = (maps.mean(axis=1) for maps in (ours, mx.stop_gradient(teacher[pick])))
        b = mx.where(a > 0, b, 0)
        b = b / b.sum(axis=-1, keepdims=True)
        log_ratio = mx.log(mx.where(b > 0, b, 1)) - mx.log(mx.where(b > 0, a, 1))
        total = total + (b * log_ratio).sum(axis=-1)
    return (total / len(student) * mask).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("expert", "student"),
    [
        ("llama", "qwen3"),
        ("granite", "gemma3_text"),
        ("gemma3_text", "mistral"),
        ("qwen3", "granite"),
        ("llama", "smollm3"),
    ],
)
def test_value_and_gradient_of_the_loss(views, expert, student, recompute):
    """Of every weight of the student, the loss alone and beside another one."""
    tokens, mask = some_tokens(), mx.array([[1] * LENGTH, [1] * 7 + [0] * (LENGTH - 7)])
    expert, student = views(expert), views(student)
    seen = expert.forward(tokens, attention=True).attention
    teacher = [mx.stop_gradient(log_attention(calls)) for calls in seen]

    def loss(_):
        seen = student.forward(tokens, recompute=recompute, attention=True)
        ours = [log_attention(calls) for calls in seen.attention]
        value = attention_matching_loss(ours, teacher, mask, heads="mean")[0]
        return value + mx.square(seen.final).mean()

    def dense(_):
        theirs, ours = [], []
        with replaced(dense_attention(theirs)):
            expert.forward(tokens)
        with replaced(dense_attention(ours)):
            final = student.forward(tokens).final
        return dense_loss(ours, theirs, mask) + mx.square(final).mean()

    value, gradient = nn.value_and_grad(student.model, loss)(student.model)
    wanted, reference = nn.value_and_grad(student.model, dense)(student.model)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert value.item() > 1
    for (name, ours), (_, theirs) in zip(
        tree_flatten(gradient), tree_flatten(reference), strict=True
    ):
        size = mx.abs(theirs).max().item()
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * size + 1e-6, err_msg=name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert size > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision(tmp_path, dtype, tolerance):
    view = load(make_model_dir(tmp_path, arch="qwen2", dtype=dtype), dequantize="never").view
    tokens = some_tokens(1, 6)
    half = log_attention(view.forward(tokens, attention=True).attention[0])
    assert half.dtype == mx.float32
    check_attention(view)
    view.model.set_dtype(mx.float32)
    exact = log_attention(view.forward(tokens, attention=True).attention[0])
    np.testing.assert_allclose(np.array(mx.exp(half)), np.array(mx.exp(exact)), atol=tolerance)


def test_right_padding_is_not_seen(views):
    view, tokens = views("gemma3_text"), some_tokens(1, 8)
    padded = mx.concatenate([tokens[:, :5], mx.zeros((1, 3), mx.int32)], axis=1)
    rows = [
        np.array(log_attention(view.forward(text, attention=True).attention[1]))[:, :, :5]
        for text in (tokens[:, :5], padded)
    ]
    np.testing.assert_allclose(np.exp(rows[1][..., :5]), np.exp(rows[0]), atol=1e-6)
    assert (rows[1][..., 5:] == LOG_ZERO).all()


def test_another_thread_s_attention_is_not_kept_and_nothing_stays():
    fused, some = mx.fast.scaled_dot_product_attention, mx.zeros((1, 1, 2, 4))
    with pytest.raises(KeyError), recorded() as calls:
        run = {"args": (some, some, some), "kwargs": {"scale": 1.0, "mask": None}}
        other = threading.Thread(target=mx.fast.scaled_dot_product_attention, **run)
        other.start()
        other.join()
        assert not calls
        mx.fast.scaled_dot_product_attention(*run["args"], **run["kwargs"])
        assert len(calls) == 1
        raise KeyError
    assert mx.fast.scaled_dot_product_attention is fused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma2", "no attention, or one that is not MLX's own"),
        ("gpt_oss", "attention sinks"),
        ("qwen3_5", "no attention"),
    ],
)
def test_what_cannot_be_read_is_refused(views, name, why):
    calls = views(name).forward(some_tokens(1, 5), attention=True).attention
    with pytest.raises(UserError, match=rf"llama, mistral, qwen3.*{why}.*leave it out"):
        for of_block in calls:
            log_attention(of_block)
