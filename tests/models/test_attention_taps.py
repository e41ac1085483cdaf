"""Attention weights computed again, against the blocks themselves and mlx-lm's fused attention."""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen3
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_fd.errors import UserError
from mlx_fd.losses.attention import attention_matching_loss
from mlx_fd.models.attention_taps import log_attention
from mlx_fd.models.loading import load
from support.tiny import make_model_dir

MODELS = {
    "llama": {"arch": "llama"},
    "llama-bias-rope3": {
        "arch": "llama",
        "attention_bias": True,
        "heads": 3,
        "kv_heads": 1,
        "hidden": 48,
        "head_dim": 20,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"arch": "qwen2", "heads": 4, "kv_heads": 2},
    "qwen2-mha": {"arch": "qwen2", "heads": 2, "kv_heads": 2, "rope_theta": 1e6},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taps")
    return {
        name: load(make_model_dir(folder / name, seed=7, **changes)).view
        for name, changes in MODELS.items()
    }


def some_tokens(batch=2, length=9, seed=0):
    return mx.array(np.random.default_rng(seed).integers(0, 400, (batch, length)))


def values_of(block, hidden):
    """[B, query heads, T, head_dim]: each value head as often as it is used."""
    attention = block.self_attn
    batch, length, _ = hidden.shape
    values = attention.v_proj(block.input_layernorm(hidden))
    values = values.reshape(batch, length, attention.n_kv_heads, -1).transpose(0, 2, 1, 3)
    return mx.repeat(values, attention.n_heads // attention.n_kv_heads, axis=1)


def block_output(block, hidden, weights):
    """The whole block, with its attention made of ``weights``."""
    mixed = weights @ values_of(block, hidden)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(*hidden.shape[:2], -1)
    after = hidden + block.self_attn.o_proj(mixed)
    return after + block.mlp(block.post_attention_layernorm(after))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 2, 9, 33])
def test_weights_times_values_are_the_blocks_own_output(models, name, length):
    seen = models[name].forward(some_tokens(2, length))
    for i, block in enumerate(models[name].blocks):
        weights = mx.exp(log_attention(block, seen.layers[i]))
        assert weights.shape == (2, block.self_attn.n_heads, length, length)
        assert weights.dtype == mx.float32
        output = block_output(block, seen.layers[i], weights)
        np.testing.assert_allclose(np.array(output), np.array(seen.layers[i + 1]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_weights_times_values_are_the_fused_kernels(models, name, monkeypatch):
    """What the block hands to the fused kernel, and what that gives back, seen from outside."""
    calls = []

    def spy(queries, keys, values, **options):
        calls.append((values, scaled_dot_product_attention(queries, keys, values, **options)))
        return calls[-1][1]

    module = importlib.import_module(type(models[name].model).__module__)
    monkeypatch.setattr(module, "scaled_dot_product_attention", spy)
    seen = models[name].forward(some_tokens(2, 12))
    for i, block in enumerate(models[name].blocks):
        values, fused = calls[i]
        values = mx.repeat(values, fused.shape[1] // values.shape[1], axis=1)
        ours = mx.exp(log_attention(block, seen.layers[i])) @ values
        np.testing.assert_allclose(np.array(ours), np.array(fused), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_causal_distributions(models, name):
    seen = models[name].forward(some_tokens(1, 7))
    weights = np.array(mx.exp(log_attention(models[name].blocks[1], seen.layers[1])))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (weights[..., np.triu(np.ones((7, 7), bool), 1)] == 0).all()
    assert (weights[..., np.tril(np.ones((7, 7), bool))] > 0).all()


def test_chosen_rows(models):
    model = models["qwen2"]
    seen = model.forward(some_tokens(2, 9))
    positions = mx.array([[3, 4, 5], [8, 0, 0]])
    whole = np.array(log_attention(model.blocks[0], seen.layers[0]))
    some = np.array(log_attention(model.blocks[0], seen.layers[0], positions=positions))
    for sample, row in np.ndindex(2, 3):
        place = positions[sample, row].item()
        np.testing.assert_allclose(
            some[sample, :, row], whole[sample, :, place], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", MODELS)
def test_rows_after_a_cache(models, name):
    """A prompt read first, then the rest: the rows are those of the text read at once."""
    model, tokens = models[name], some_tokens(1, 11)
    whole = model.forward(tokens)
    cache = make_prompt_cache(model.model)
    model.forward(tokens[:, :6], cache)
    seen = model.forward(tokens[:, 6:], cache)
    positions = mx.array([[1, 4]])
    for i, block in enumerate(model.blocks):
        expected = np.array(log_attention(block, whole.layers[i]))[:, :, 6:]
        ours = np.array(log_attention(block, seen.layers[i], cache=cache[i]))
        np.testing.assert_allclose(np.exp(ours), np.exp(expected), atol=1e-5)
        two = log_attention(block, seen.layers[i], positions=positions, cache=cache[i])
        np.testing.assert_array_equal(np.array(two), ours[:, :, [1, 4]])


def test_right_padding_is_not_seen(models):
    model, tokens = models["llama"], some_tokens(1, 8)
    padded = mx.concatenate([tokens[:, :5], mx.zeros((1, 3), mx.int32)], axis=1)
    rows = [
        np.array(log_attention(model.blocks[1], model.forward(text).layers[1]))[:, :, :5]
        for text in (tokens[:, :5], padded)
    ]
    np.testing.assert_allclose(np.exp(rows[1][..., :5]), np.exp(rows[0]), atol=1e-6)
    assert (np.exp(rows[1][..., 5:]) == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision(tmp_path, dtype, tolerance):
    directory = make_model_dir(tmp_path, arch="qwen2", dtype=dtype)
    model = load(directory, dequantize="never").view
    seen = model.forward(some_tokens(1, 6))
    assert seen.layers[0].dtype == getattr(mx, dtype)
    half = log_attention(model.blocks[0], seen.layers[0])
    assert half.dtype == mx.float32
    model.model.set_dtype(mx.float32)
    exact = log_attention(model.blocks[0], seen.layers[0].astype(mx.float32))
    np.testing.assert_allclose(np.array(mx.exp(half)), np.array(mx.exp(exact)), atol=tolerance)


def test_the_student_learns_to_look_where_the_expert_looks(tmp_path, models):
    """Through LoRA on query and key, whose weights the tap must see: the loss falls."""
    student = load(make_model_dir(tmp_path, heads=2, kv_heads=1, layers=2, seed=3))
    student, view = student.model, student.view
    student.freeze()
    linear_to_lora_layers(student, 2, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    tokens = some_tokens(2, 8)
    theirs = models["qwen2"].forward(tokens)
    blocks = zip(models["qwen2"].blocks, theirs.layers, strict=False)
    teacher = [log_attention(block, hidden) for block, hidden in blocks]
    mask = mx.array([[1] * 8, [1] * 5 + [0] * 3])

    def loss(model):
        seen = view.forward(tokens)
        ours = [
            log_attention(block, hidden)
            for block, hidden in zip(view.blocks, seen.layers, strict=False)
        ]
        total, count = attention_matching_loss(ours, teacher, mask, heads="mean")
        return total / count

    step = nn.value_and_grad(student, loss)
    before, gradients = step(student)
    moved = gradients["model"]["layers"][1]["self_attn"]
    assert mx.abs(moved["q_proj"]["lora_b"]).max().item() > 0
    assert mx.abs(moved["k_proj"]["lora_b"]).max().item() > 0
    for _ in range(30):
        _, gradients = step(student)
        student.update(
            tree_map(lambda w, g: w - 0.3 * g, student.trainable_parameters(), gradients)
        )
    assert loss(student).item() < 0.7 * before.item()


def test_a_block_of_another_architecture():
    """Qwen3 norms its queries and keys: reading it like qwen2 would be silently wrong."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    rest = {"rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 1e4}
    args = qwen3.ModelArgs(model_type="qwen3", tie_word_embeddings=True, **sizes, **heads, **rest)
    for block in (qwen3.TransformerBlock(args), nn.TransformerEncoderLayer(16, 2)):
        with pytest.raises(UserError, match="llama and qwen2"):
            log_attention(block, mx.zeros((1, 2, 16)))


def test_a_sliding_window():
    args = llama.ModelArgs("llama", 16, 1, 32, 2, 1e-5, 50)
    block = llama.TransformerBlock(args, use_sliding=True)
    with pytest.raises(UserError, match="sliding window"):
        log_attention(block, mx.zeros((1, 2, 16)), cache=KVCache())
