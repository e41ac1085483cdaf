"""LoRA adapters as the PEFT library has them.

mlx-lm computes y = x W^T + s (x A) B with A [in, r] and B [r, out]; PEFT computes
y = x W^T + (alpha / r) (x A'^T) B'^T with A' [r, in] and B' [out, r]. So A' = A^T, B' = B^T and
alpha = s r.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.export.source import Source, adapter_config, check_architecture
from mlx_fd.files import write_json
from mlx_fd.models.loading import open_lazily
from mlx_fd.models.student import ADAPTER_WEIGHTS, read_arrays

if TYPE_CHECKING:
    from mlx import nn

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def write_adapter(source: Source, folder: Path, *, base_model: str | None = None) -> None:
    """Write a student's LoRA as PEFT reads it.

    Args:
        source: a student that was trained with LoRA.
        folder: an empty folder.
        base_model: the base's name for ``base_model_name_or_path``; ``None``: the name under which
            it was trained.

    Raises:
        UserError: there is no adapter, or it is no LoRA of a known architecture.
    """
    import mlx.core as mx

    config = adapter_config(source.ref)
    if config["fine_tune_type"] != "lora":
        raise UserError(
            "--adapter: this student was trained in all its weights, and PEFT's format holds "
            "LoRA; leave --adapter out"
        )
    model, base_config = open_lazily(source.ref.model)
    check_architecture(base_config["model_type"], "--format hf")
    assert source.ref.adapter_folder is not None
    rank = int(config["lora_parameters"]["rank"])
    alpha = config["lora_parameters"]["scale"] * rank
    arrays, targets, layers = {}, set(), set()
    for name, array in read_arrays(source.ref.adapter_folder / ADAPTER_WEIGHTS).items():
        module, part = name.rsplit(".", 1)
        arrays[f"{_PREFIX}{module}.lora_{part[-1].upper()}.weight"] = mx.contiguous(array.T)
        targets.add(module.rsplit(".", 1)[1])
        layers.add(int(module.split(".")[2]))
    mx.save_safetensors(str(folder / WEIGHTS), arrays, metadata={"format": "pt"})
    written: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or source.base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "layers_to_transform": None if len(layers) == len(model.layers) else sorted(layers),
        "layers_pattern": None if len(layers) == len(model.layers) else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, written)


def put_adapter(model: nn.Module, folder: Path) -> None:
    """Add what :func:`write_adapter` wrote to its base model, as PEFT's ``merge`` would.

    Args:
        model: the base model; it is dequantised and changed in place.
        folder: where the adapter is.
    """
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    arrays = read_arrays(folder / WEIGHTS)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, low in arrays.items():
        if not name.endswith(".lora_A.weight"):
            continue
        high = arrays[name.replace(".lora_A.", ".lora_B.")]
        module = modules[name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")]
        scale = config["lora_alpha"] / config["r"]
        module.weight = module.weight + (scale * (high @ low)).astype(module.weight.dtype)
