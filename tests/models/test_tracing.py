"""Memory that is read off a graph against memory that MLX used."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402

from mlx_fd.config import ModelOptions  # noqa: E402
from mlx_fd.models.lora import put_lora  # noqa: E402
from mlx_fd.models.outline import build  # noqa: E402
from mlx_fd.models.tracing import grows_with_length, trace, trace_by_length  # noqa: E402
from mlx_fd.models.view import block_states  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
MODELS = {
    "llama": {"model_type": "llama", **SIZES},
    "four-bit": {"model_type": "llama", **SIZES, "quantization": {"group_size": 64, "bits": 4}},
    "experts": {"model_type": "qwen3_moe", **SIZES, **EXPERTS},
}


class Nothing(nn.Module):
    """A model without parameters."""


def test_what_is_there_at_the_same_time_is_counted() -> None:
    x = mx.zeros((256, 256))  # 1/4 MiB, never made
    size = x.nbytes
    model = Nothing()
    # A product, and another one of it: both are there, and then the second alone.
    found = trace(model, lambda a: (a @ a) @ a, x)
    assert (found.peak, found.kept, found.made) == (2 * size, size, 2 * size)
    # In the place of the product, which nothing else needs.
    assert trace(model, lambda a: mx.exp(a @ a), x).peak == size
    # The product is needed again.
    assert trace(model, lambda a: [a @ a, mx.exp(a @ a)], x).peak == 2 * size
    # Nothing but the input, seen otherwise; and a copy, where the order is another.
    assert trace(model, lambda a: a.T[:, None], x).peak == 0
    assert trace(model, lambda a: a.T.reshape(-1), x).peak == size


def test_what_mlx_cannot_describe_is_counted_too() -> None:
    x = mx.zeros((256, 256))
    found = trace(Nothing(), lambda a: mx.contiguous(a.T) @ a, x)
    assert (found.peak, found.kept) == (pytest.approx(2 * x.nbytes, abs=16), x.nbytes)
    assert mx.array_equal(mx.contiguous(mx.array([1.0])), mx.array([1.0]))


def test_nothing_is_made_and_the_model_stays_as_it_was() -> None:
    gc.collect()
    model = build(MODELS["experts"])
    put_lora(model, ModelOptions())
    weights = model.parameters()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tokens = mx.zeros((8, 128), dtype=mx.int32)
    found = trace(model, lambda t: block_states(model, t)[-1], tokens)
    assert found.peak > 8 * 128 * 128 * 4
    assert mx.get_peak_memory() - before < 1 << 16
    after = model.parameters()
    assert after["model"]["embed_tokens"]["weight"] is weights["model"]["embed_tokens"]["weight"]


@pytest.mark.parametrize("name", MODELS)
def test_training_takes_what_its_graph_says(name: str) -> None:
    mx.random.seed(0)
    model = build(MODELS[name])
    put_lora(model, ModelOptions(lora_rank=8))
    tokens = mx.zeros((4, 64), dtype=mx.int32)

    def loss(given: mx.array) -> mx.array:
        return block_states(model, given)[-1].sum()

    def step(given: mx.array) -> Any:
        return nn.value_and_grad(model, loss)(given)

    found = trace(model, step, tokens)
    mx.eval(model.parameters(), tokens)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = step(tokens)
    mx.eval(results)
    measured = mx.get_peak_memory() - before
    kept = mx.get_active_memory() - before
    assert 0.9 * measured < found.peak < 1.3 * measured, found.peak / measured
    assert abs(found.kept - kept) < 0.1 * kept + 8192


def test_a_recurrence_is_extrapolated() -> None:
    """A graph with operations for each token, whose memory grows with their square."""
    model = Nothing()
    lengths = []

    def by_steps(count: int) -> Any:
        lengths.append(count)

        def run(x: mx.array) -> Any:
            state = x
            kept = []
            for _ in range(count):
                state = mx.tanh(state @ state)
                kept.append(state)
            return [kept, mx.broadcast_to(x[:1, :1], (count, count)) + 1.0]

        return trace(model, run, mx.zeros((64, 64)))

    assert grows_with_length(by_steps)
    assert not grows_with_length(lambda n: trace(model, mx.exp, mx.zeros((n, 4))))
    found = trace_by_length(by_steps, 1000, grows=True)
    assert max(lengths) <= 64
    exact = 1000 * 64 * 64 * 4 + 1000 * 1000 * 4
    assert found.kept == pytest.approx(exact, rel=0.01)
    assert trace_by_length(by_steps, 20, grows=True).kept == 20 * 64 * 64 * 4 + 20 * 20 * 4
