"""Models by their shapes: weights and caches against files, published sizes and real caches."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.models.backend import backend
from support import tiny

backend()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import get_total_parameters, quantize_model  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.models.loading import open_as_loaded, open_lazily  # noqa: E402
from mlx_fd.models.outline import (  # noqa: E402
    build,
    cache_bytes,
    hidden_width,
    logit_rows,
    weight_bytes,
)
from support import FIXTURES  # noqa: E402
from support.architectures import config_of, make_architecture  # noqa: E402

CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
FOUR_BIT = {"quantization": {"group_size": 64, "bits": 4}}
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 262144,
    "norm_topk_prob": True,
}
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "rope_theta": 150000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # The sizes of the published checkpoints' tensors.
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_parameters_of_published_models(name: str, count: int) -> None:
    gc.collect()
    before = mx.get_active_memory()
    model = build(CONFIGS[name])
    assert get_total_parameters(model) == count
    assert weight_bytes(model) == 2 * count
    four_bit = weight_bytes(build({**CONFIGS[name], **FOUR_BIT}))
    assert 4.5 * count / 8 <= four_bit < 4.51 * count / 8
    assert mx.get_active_memory() - before < 1 << 20, "the weights are never made"


def test_a_mixture_of_experts_has_all_of_them() -> None:
    """The 4-bit files of Qwen3-30B-A3B have 17.2 GB; a dense model of its config.json had 1.9."""
    model = build({**QWEN3_30B_A3B, **FOUR_BIT})
    assert get_total_parameters(model) == pytest.approx(30.5e9, rel=0.01)
    assert weight_bytes(model) == pytest.approx(17.2e9, rel=0.02)
    # 48 layers x 4 heads x 128 x keys and values x 2 bytes, in steps of 256 tokens.
    token = 48 * 4 * 128 * 2 * 2
    assert cache_bytes(model, 1000) == pytest.approx(token * 1024, rel=0.01)
    assert (hidden_width(model), logit_rows(model)) == (2048, 151936)


def test_mxfp4_experts_beside_16_bit_attention() -> None:
    """The published files of gpt-oss-20b have 13.76 GB: experts in mxfp4, all else in bfloat16."""
    model = build(GPT_OSS_20B)
    assert get_total_parameters(model) == pytest.approx(20.9e9, rel=0.01)
    assert weight_bytes(model) == pytest.approx(13.76e9, rel=0.02)
    # Every other layer holds no more than its window.
    row = 8 * 64 * 2 * 2
    assert cache_bytes(model, 1000) == pytest.approx(12 * row * (1024 + 128), rel=0.01)
    assert cache_bytes(model, 9000) == pytest.approx(12 * row * (9216 + 128), rel=0.01)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantize", [None, (4, 64), (8, 32)])
def test_weight_bytes_are_those_of_the_file(
    tmp_path: Path, arch: str, tie: bool, quantize: tuple[int, int] | None
) -> None:
    path = tiny.make_model_dir(
        tmp_path / "m", arch=arch, tie=tie, quantize=quantize, dtype="float16", intermediate=192
    )
    config = json.loads((path / "config.json").read_text())
    stored = mx.load(str(path / "model.safetensors"))
    size = sum(array.nbytes for array in stored.values())
    assert weight_bytes(open_lazily(path)[0]) == size
    assert weight_bytes(build({**config, "torch_dtype": "float16"})) == size
    dense = 4 * get_total_parameters(build(config))
    assert weight_bytes(open_as_loaded(path)[0]) == (dense if backend().on_cpu else size)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama"])
def test_mixed_packings_are_those_that_mlx_lm_writes(name: str, mode: str) -> None:
    """Per-layer overrides, as config.json has them after mlx-lm's own quantize_model."""
    config = {**config_of(name), "torch_dtype": "bfloat16"}
    model = build(config)
    default = getattr(model, "quant_predicate", None)

    def mixed(path: str, module: Any) -> Any:
        if "o_proj" in path:
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return default(path, module) if default else True

    quantized, config = quantize_model(
        model, {**config}, None, None, mode=mode, quant_predicate=mixed
    )
    assert weight_bytes(build(config)) == weight_bytes(quantized)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_caches_are_as_large_as_real_ones(tmp_path: Path, name: str, tokens: int) -> None:
    path = make_architecture(tmp_path / name, name)
    model, _ = open_lazily(path)
    predicted = cache_bytes(model, tokens)
    caches = make_prompt_cache(model)
    ids = mx.arange(tokens)[None] % 100
    # As it is written: a prompt of one token, and one token after the other, or nearly so.
    for start in range(0, tokens, 8):
        model(ids[:, start : start + 8], cache=caches)
        mx.eval([cache.state for cache in caches])
    real = sum(cache.nbytes for cache in caches)
    assert real <= predicted * 1.02
    assert predicted <= 1.5 * real


def test_what_mlx_lm_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="no_such"):
        build({"model_type": "no_such", "hidden_size": 4})
    without = {key: value for key, value in CONFIGS["qwen2.5-0.5b"].items() if key != "hidden_size"}
    with pytest.raises(UserError, match="hidden_size"):
        build(without)
    assert all(a.size for _, a in tree_flatten(build(CONFIGS["qwen2.5-0.5b"]).parameters()))
