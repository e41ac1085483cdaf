"""Forms of quantised weights that mlx-lm does not read are refused by config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.errors import UserError
from mlx_fd.models.published_config import as_mlx_lm_reads, read_config
from mlx_fd.models.quantization import READERS
from support.architectures import config_of, make_architecture

import mlx.core as mx  # isort: skip
import mlx_lm  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

from mlx_fd.models.layer_kinds import build
from mlx_fd.models.loading import open_lazily

FILE = Path("config.json")
MX = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"quantization": {**MX, "mode": "mxfp6", "bits": 6}}, "as mxfp6 with 6 bits in groups"),
        ({"quantization": {**MX, "bits": 8}}, "as mxfp4 with 8 bits in groups of 32"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "as affine with 7 bits"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "in groups of 48"),
        ({"quantization": {"bits": 4}}, "in groups of None"),
        ({"quantization": {}}, "with None bits in groups of None"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "in groups of 0"),
        ({"quantization": {"bits": -1, "group_size": 64}}, "with -1 bits"),
        ({"quantization": {"bits": True, "group_size": 64}}, "with True bits"),
        ({"quantization": {"bits": 1 << 70, "group_size": 64}}, "which MLX does not have"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "which MLX does not have"),
        ({"quantization": {**MX, "lm_head": {"mode": "fp6", "bits": 6}}}, "lm_head are quantised"),
        ({"quantization_config": {"quant_method": "mxfp6"}}, "with quant_method mxfp6, which"),
        ({"quantization_config": {"bits": 4}}, "with quant_method None"),
        ({"quantization_config": "fp8"}, "is 'fp8', no object"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "does not read for llama models"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "quant_method awq, bits 8"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version gemv"),
        (
            {"quantization_config": {"quant_method": "awq"}, "num_experts": 4},
            "does not read for experts",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method bitsandbytes"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float"}},
            "format float",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "modelopt",
                    "quantization": {"quant_algo": "FP8"},
                }
            },
            "quant_algo FP8",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "quant_algo NVFP4, which mlx-lm does not read for llama models",
        ),
        *(
            (
                {"quantization_config": {"quant_method": "compressed-tensors", "format": form}},
                f"format {form}, which mlx-lm does not read for llama models",
            )
            for form in ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
        ),
    ],
)
def test_what_nobody_reads_is_refused(entry: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        as_mlx_lm_reads({**config_of("llama"), **entry}, FILE)


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization": {"bits": 4, "group_size": 64}},
        {"quantization": {"bits": 6, "group_size": 128, "mode": "affine"}},
        {"quantization": {**MX, "lm_head": {"bits": 8, "group_size": 64, "mode": "affine"}}},
        {"quantization": {**MX, "lm_head": {"bits": 8, "group_size": 64}}},
        {"quantization": {**MX, "model.layers.0.mlp.up_proj": False}},
        {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}},
        {"quantization": {"bits": 8, "group_size": 32, "mode": "mxfp8"}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        {"quantization_config": {"quant_method": "awq", "version": "GEMM"}},
        # What mlx-lm writes: its own entry counts.
        {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4}},
    ],
)
def test_what_mlx_lm_reads_is_not(entry: dict[str, Any]) -> None:
    read = as_mlx_lm_reads({**config_of("llama"), **entry}, FILE)
    assert all(read[key] == value for key, value in entry.items())


def test_a_directory_says_where(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    config["quantization"] = {"bits": 6, "group_size": 32, "mode": "mxfp6"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model/config\.json: the weights are quantised as mxfp6"):
        read_config(model)


# ------------------------------------------------------------- what a class makes of published ones

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FP8_WHOLE = {"quant_method": "fp8", "weight_block_size": None}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
}
# 2.0 in F8_E4M3, whose bytes MLX reads as uint8; and half of that is what is meant.
BYTE, SCALE = 0x40, 0.5


def sanitized(name: str, parts: Callable[[tuple[int, ...]], dict[str, mx.array]]) -> dict[str, Any]:
    """What mlx-lm's class makes of a model with one matrix in another form; that matrix's parts."""
    model = build(as_mlx_lm_reads(config_of(name), FILE))
    weights = dict(tree_flatten(model.parameters()))
    key = next(key for key in weights if key.endswith("o_proj.weight"))
    module = key.removesuffix("weight")
    for part, value in parts(weights.pop(key).shape).items():
        weights[module + part] = value
    made = model.sanitize(weights)
    return {part.removeprefix(module): made[part] for part in made if part.startswith(module)}


def in_fp8(scale: mx.array) -> Callable[[tuple[int, ...]], dict[str, mx.array]]:
    return lambda shape: {
        "weight": mx.full(shape, BYTE, mx.uint8),
        "weight_scale_inv": scale,
    }


def read_right(name: str, scale: mx.array) -> bool:
    try:
        made = sanitized(name, in_fp8(scale))
    except (ValueError, IndexError):  # it has no scales of such a shape
        return False
    weight = made["weight"]
    floating = mx.issubdtype(weight.dtype, mx.floating)
    return made.keys() == {"weight"} and floating and bool((weight == BYTE // 32 * SCALE).all())


def accepts(name: str, published: dict[str, Any]) -> bool:
    try:
        as_mlx_lm_reads({**config_of(name), "quantization_config": published}, FILE)
    except UserError:
        return False
    return True


OF_FP8 = (
    *("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k25", "minimax", "mimo_v2_flash"),
    *("mistral4", "kimi_vl", "ministral3", "mistral3_ministral3", "llama", "qwen3", "qwen3_moe"),
)


@pytest.mark.parametrize("name", OF_FP8)
def test_fp8_is_taken_where_the_class_makes_the_right_numbers_of_it(name: str) -> None:
    blocks, whole = mx.full((1, 1), SCALE), mx.array(SCALE)
    assert accepts(name, FP8) == read_right(name, blocks)
    assert accepts(name, FP8_WHOLE) == read_right(name, whole)


def test_every_class_of_mlx_lm_that_asks_for_scales_of_fp8_is_known() -> None:
    """A new one has to be looked at, and held against a known matrix above."""
    modules = Path(mlx_lm.models.base.__file__).parent.glob("*.py")
    asking = {one.stem for one in modules if "scale_inv" in one.read_text(encoding="utf-8")}
    known = {*READERS["quant_method fp8, weight_block_size [128, 128]"], "minimax_m3_vl"}
    assert asking - known <= {"ministral3"}


def test_packed_integers_are_taken_where_the_class_makes_the_right_numbers_of_them() -> None:
    def packed(shape: tuple[int, ...]) -> dict[str, mx.array]:
        rows, columns = shape
        return {
            "weight_packed": mx.full((rows, columns // 8), 0x99999999, mx.uint32).view(mx.int32),
            "weight_scale": mx.full((rows, columns // 32), SCALE),
            "weight_shape": mx.array(shape),
        }

    for name in ("deepseek_v3", "kimi_k25", "mistral4", "kimi_vl", "llama"):
        made = sanitized(name, packed)
        right = made.keys() == {"weight", "scales", "biases"} and bool(
            (mx.dequantize(made["weight"], made["scales"], made["biases"], 32, 4) == SCALE).all()
        )
        assert accepts(name, PACKED) == right
    for wrong in ({"num_bits": 8}, {"num_bits": 4, "symmetric": False}):
        groups = {"group_0": {"weights": wrong}}
        assert not accepts("deepseek_v3", {**PACKED, "config_groups": groups})
    assert not accepts("deepseek_v3", {**PACKED, "config_groups": None})


def test_the_entry_of_the_language_model_counts() -> None:
    config = config_of("kimi_vl")
    config["text_config"] = {**config["text_config"], "quantization_config": FP8}
    with pytest.raises(UserError, match="quant_method fp8"):
        as_mlx_lm_reads(config, FILE)


def test_the_file_that_modelopt_keeps_beside_counts(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "llama")
    file = model / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(UserError, match="quant_method None"):
        read_config(model)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_config(model)


def test_ministral_in_fp8_is_not_loaded(tmp_path: Path) -> None:
    model = make_architecture(tmp_path / "model", "ministral3", quantization_config=FP8_WHOLE)
    with pytest.raises(UserError, match="does not read for ministral3 models; take the unquant"):
        open_lazily(model)
