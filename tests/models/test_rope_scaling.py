"""Scaled rotary positions as GGUF and transformers have them, against mlx-lm's own modules."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE  # noqa: E402

from mlx_fd.models import rope_scaling as rope  # noqa: E402
from mlx_fd.models.families import FAMILIES  # noqa: E402

CONFIG = {"max_position_embeddings": 4096, "rope_theta": 10000.0}
PLAIN = rope.Stored("none", None, None, None, None, None, {})
FACTORS = np.linspace(1, 3, 8)
TABLES = {rope.LONG: FACTORS, rope.SHORT: np.ones(8)}


def test_llama3s_divisors_are_mlx_lms():
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    module = Llama3RoPE(64, base=500000.0, scaling_config=scaling)
    plain = 500000.0 ** (np.arange(0, 64, 2) / 64)
    divisors = rope.llama3_divisors(500000.0, 64, 32.0, 1.0, 4.0, 8192)
    assert np.allclose(np.array(module._freqs) / plain, divisors, rtol=1e-5)


def test_longropes_factor_is_mlx_lms():
    for longest in (4096, 131072):
        module = SuScaledRoPE(16, 10000.0, longest, 4096, long_factor=[1.0] * 8)
        assert rope.long_attention_factor(longest, 4096) == pytest.approx(module._scale)


@pytest.mark.parametrize("more", [{}, {"mscale": 0.7, "mscale_all_dim": 0.3}, {"mscale": 2.0}])
def test_yarns_factor_is_told_to_transformers(more: dict[str, Any]):
    """It would take its own where it is told only one of the two scales."""
    scaling = {"rope_type": "yarn", "factor": 8.0, **more}
    module = YarnRoPE(16, scaling_factor=8.0, **more)
    told = rope.for_transformers(FAMILIES["qwen3"], SimpleNamespace(rope_scaling=scaling))
    assert told["attention_factor"] == pytest.approx(module.mscale)
    # What mlx-lm takes where nothing is said.
    assert (told["original_max_position_embeddings"], told["truncate"]) == (4096, True)
    x = mx.random.normal((1, 1, 3, 16))
    again = YarnRoPE(16, scaling_factor=8.0, original_max_position_embeddings=4096, **more)
    assert mx.array_equal(module(x), again(x))


def test_longrope_may_be_said_by_its_tables_alone():
    """As files of Phi-3 were made once."""
    stored = dataclasses.replace(PLAIN, original=64, tables=TABLES)
    found = rope.from_file(stored, FAMILIES["phi3"], CONFIG, 16)
    assert found is not None and found["type"] == "longrope"
    assert np.allclose(found["long_factor"], FACTORS)


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("qwen3", {"tables": TABLES, "original": 64}, "not supported for qwen3"),
        ("phi3", {"tables": {rope.LONG: FACTORS}, "original": 64}, "not supported for phi3"),
        ("phi3", {"tables": TABLES}, "original_context_length is missing"),
        ("phi3", {"tables": TABLES, "original": 64, "attention": 3.0}, "attention factor 3.0"),
        (
            "phi3",
            {"tables": {**TABLES, rope.SHORT: np.ones(4)}, "original": 64},
            "unexpected shape",
        ),
        ("llama", {"kind": "linear"}, "factor is missing"),
        ("llama", {"kind": "linear", "factor": 2.0, "attention": 1.2}, "no rope.scaling.attn_fac"),
        ("llama", {"attention": 1.2}, "attn_factor .1.2. for default"),
        ("llama", {"kind": "yarn", "factor": 4.0}, "original_context_length is missing"),
        ("llama", {"tables": {rope.FREQS: FACTORS}}, "not Llama 3's"),
        ("gemma3_text", {"kind": "yarn", "factor": 4.0, "original": 64}, "of type yarn"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(family: str, change: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        rope.from_file(dataclasses.replace(PLAIN, **change), FAMILIES[family], CONFIG, 16)
