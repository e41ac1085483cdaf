"""Adapters for PEFT: which modules, DoRA, and what PEFT has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_fd.models.backend import backend
from support.architectures import make_architecture

backend()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.export.exporter import export  # noqa: E402
from mlx_fd.export.form import Form  # noqa: E402
from mlx_fd.export.peft import Place, targets  # noqa: E402
from mlx_fd.models.loading import open_lazily  # noqa: E402

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


def make_adapter(
    folder: Path,
    name: str,
    *,
    keys: list[str] | None = None,
    dora: bool = False,
    layers: int = 2,
) -> tuple[Path, Path]:
    """A random model and a random adapter of mlx-lm's on its last blocks."""
    model_dir = make_architecture(folder / "model", name)
    model, _ = open_lazily(model_dir)
    model.freeze()
    parameters: dict[str, Any] = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    linear_to_lora_layers(model, layers, parameters, use_dora=dora)
    rng = np.random.default_rng(0)
    arrays = {}
    for path, value in tree_flatten(model.trainable_parameters()):
        noise = mx.array(rng.standard_normal(value.shape).astype(np.float32))
        # DoRA's lengths stay near those of the weights' rows.
        arrays[path] = value * (1 + 0.2 * noise) if path.endswith(".m") else 0.1 * noise
    adapter = folder / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    config = {
        "model": str(model_dir),
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return model_dir, adapter


def written(adapter: Path, out: Path) -> tuple[Any, dict[str, Any], dict[str, mx.array]]:
    form = Form(format="hf", adapter=True, parity_problems=0)
    done = export("", out, form, adapter=adapter, progress=lambda *_: None)
    config = json.loads((out / "adapter_config.json").read_text())
    return done, config, mx.load(str(out / "adapter_model.safetensors"))


def test_chosen_modules(tmp_path):
    _, adapter = make_adapter(tmp_path, "llama", keys=ATTENTION)
    done, config, arrays = written(adapter, tmp_path / "out")
    assert done.agreement.mean_kl < 1e-8
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [2, 3] and not config["use_dora"]
    assert (config["r"], config["lora_alpha"]) == (4, 10)
    assert len(arrays) == 2 * 2 * 2


def test_dora(tmp_path):
    """PEFT: rows of W + s B A, each scaled to a length of its own."""
    model_dir, adapter = make_adapter(tmp_path, "llama", keys=ATTENTION, dora=True)
    done, config, arrays = written(adapter, tmp_path / "out")
    assert done.agreement.mean_kl < 1e-8 and config["use_dora"]
    name = "model.layers.3.self_attn.q_proj"
    low, high, length = (
        np.array(arrays[f"base_model.model.{name}.{part}"], dtype=np.float64)
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    weight = np.array(mx.load(str(model_dir / "model.safetensors"))[f"{name}.weight"])
    adapted = weight + config["lora_alpha"] / config["r"] * high @ low
    adapted *= (length / np.linalg.norm(adapted, axis=1))[:, None]
    form = Form(format="mlx", parity_problems=0)
    export("", tmp_path / "fused", form, adapter=adapter, progress=lambda *_: None)
    fused = np.array(mx.load(str(tmp_path / "fused" / "model.safetensors"))[f"{name}.weight"])
    assert np.abs(fused - adapted).max() < 1e-5 < np.abs(fused - weight).max()


def test_modules_of_one_name_are_told_apart(tmp_path):
    """Where only some of the modules whose name ends alike carry an adapter, more is given."""
    model, _ = open_lazily(make_architecture(tmp_path / "model", "qwen3_moe"))
    both = {Place(0, "mlp.gate_proj"), Place(1, "self_attn.q_proj")}
    assert targets(both, model) == ["mlp.gate_proj", "q_proj"]
    assert targets({Place(0, "mlp.gate_proj")}, model) == ["gate_proj"]


@pytest.mark.parametrize(
    ("name", "keys", "text"),
    [
        ("qwen3_moe", ["mlp.switch_mlp.up_proj"], "keeps all experts in one tensor"),
        ("qwen3_moe", ["mlp.gate_proj"], r"layers\.0\.mlp\.gate_proj of a qwen3_moe model"),
        ("qwen3_moe", ["mlp.gate"], r"mlp\.gate of a qwen3_moe model"),
        ("gpt_oss", ["mlp.router"], r"mlp\.router of a gpt_oss model"),
        ("gpt_oss", None, "PEFT has no place for an adapter on"),
    ],
)
def test_what_peft_has_no_place_for(tmp_path, name, keys, text):
    _, adapter = make_adapter(tmp_path, name, keys=keys, layers=4)
    with pytest.raises(UserError, match=text):
        written(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "phi3", "smollm3", "granite", "gpt_oss"])
def test_every_family(tmp_path, name):
    keys = ["self_attn.qkv_proj" if name == "phi3" else "self_attn.q_proj", "self_attn.o_proj"]
    _, adapter = make_adapter(tmp_path, name, keys=keys)
    done, config, _ = written(adapter, tmp_path / "out")
    assert done.agreement.mean_kl < 1e-8
    assert config["target_modules"] == sorted(key.rpartition(".")[2] for key in keys)
