"""Forms of quantised weights that mlx-lm does not read are refused by config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.errors import UserError
from mlx_fd.models.published_config import as_mlx_lm_reads, read_config
from support.architectures import config_of, make_architecture

FILE = Path("config.json")
MX = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"quantization": {**MX, "mode": "mxfp6", "bits": 6}}, "as mxfp6 with 6 bits in groups"),
        ({"quantization": {**MX, "bits": 8}}, "as mxfp4 with 8 bits in groups of 32"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "as affine with 7 bits"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "in groups of 48"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "in groups of 0"),
        ({"quantization": {"bits": -1, "group_size": 64}}, "with -1 bits"),
        ({"quantization": {"bits": True, "group_size": 64}}, "with True bits"),
        ({"quantization": {"bits": 1 << 70, "group_size": 64}}, "which MLX does not have"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "which MLX does not have"),
        ({"quantization": {**MX, "lm_head": {"mode": "fp6", "bits": 6}}}, "lm_head are quantised"),
        ({"quantization_config": {"quant_method": "mxfp6"}}, "with quant_method mxfp6"),
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
        {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
            }
        },
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
