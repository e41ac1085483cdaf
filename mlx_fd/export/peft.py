"""LoRA and DoRA adapters as the PEFT library has them.

mlx-lm computes y = x W^T + s (x A) B with A [in, r] and B [r, out]; PEFT computes
y = x W^T + (alpha / r) (x A'^T) B'^T with A' [r, in] and B' [out, r]. So A' = A^T, B' = B^T and
alpha = s r. DoRA scales each row of the adapted W to a length of its own in both.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_fd.errors import UserError
from mlx_fd.export.source import Source, adapter_config, family_of
from mlx_fd.files import write_json
from mlx_fd.models.dense import dequantize
from mlx_fd.models.families import Family
from mlx_fd.models.loading import open_lazily
from mlx_fd.models.storage import read_json
from mlx_fd.models.student import ADAPTER_WEIGHTS, read_arrays

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_LAYERS = "model.layers."
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


_Modules = dict[str, dict[str, "mx.array"]]


class Place(NamedTuple):
    """Where a module is: the number of its block, and its name within it."""

    layer: int
    module: str


def _place(module: str, family: Family, arrays: dict[str, mx.array]) -> Place:
    """Where in a block a module is.

    Raises:
        UserError: PEFT's format has no place for an adapter on it.
    """
    layer, _, within = module.removeprefix(_LAYERS).partition(".")
    if not module.startswith(_LAYERS) or not within:
        raise UserError(f"--adapter: {module} is in no block, and PEFT adapters here are on blocks")
    experts = any(array.ndim > 2 for array in arrays.values())
    if experts or within in family.not_in_peft or not arrays.keys() <= _PARTS.keys():
        raise UserError(
            f"--adapter: PEFT has no place for an adapter on {module} of a {family.name} model"
            + (" (transformers keeps all experts in one tensor)" if experts else "")
            + "; leave --adapter out, and it is fused into the whole model"
        )
    return Place(int(layer), within)


def targets(adapted: set[Place], model: nn.Module) -> list[str]:
    """PEFT's ``target_modules``: names that select these modules of these blocks and no others.

    Args:
        adapted: the modules; the blocks that they are in are selected by number.
        model: the one that has them.

    Returns:
        The last part of each name where that is enough, in order.
    """
    places = set()
    for name, module in model.named_modules():
        layer, _, within = name.removeprefix(_LAYERS).partition(".")
        if name.startswith(_LAYERS) and layer.isdecimal() and "weight" in module:
            places.add(Place(int(layer), within))
    layers, modules = {place.layer for place in adapted}, {place.module for place in adapted}
    short = {name.rsplit(".", 1)[-1] for name in modules}
    others = {place.module for place in places if place.layer in layers} - modules
    taken = {name.rsplit(".", 1)[-1] for name in others}
    return sorted(
        {name if (last := name.rsplit(".", 1)[-1]) in taken else last for name in modules}
        if short & taken
        else short
    )


def _adapted(source: Source) -> tuple[dict[str, Any], nn.Module, _Modules, set[Place]]:
    """The adapter's configuration, its base model, its arrays by module, and where those are.

    Raises:
        UserError: there is no adapter, it is none of a known family, or on modules for which PEFT
            has no place.
    """
    config = adapter_config(source.ref)
    if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise UserError(
            "--adapter: this student was trained in all its weights, and PEFT's format holds "
            "LoRA; leave --adapter out"
        )
    model, base_config = open_lazily(source.ref.model)
    family = family_of(base_config["model_type"], "--format hf")
    assert source.ref.adapter_folder is not None
    modules: _Modules = defaultdict(dict)
    for name, array in read_arrays(source.ref.adapter_folder / ADAPTER_WEIGHTS).items():
        module, part = name.rsplit(".", 1)
        modules[module][part] = array
    return config, model, modules, {_place(m, family, parts) for m, parts in modules.items()}


def check_source(source: Source) -> None:
    """Make sure that PEFT has a place for a student's adapter. No weight is computed.

    Raises:
        UserError: it has not.
    """
    _adapted(source)


def transformers_opens_base(source: Source) -> bool:
    """Whether the base's own directory is one for transformers: not where MLX quantised it."""
    return not read_json(source.ref.model / "config.json").get("quantization")


def write_adapter(source: Source, folder: Path, *, base_model: str | None = None) -> None:
    """Write a student's LoRA or DoRA as PEFT reads it.

    Args:
        source: a student that was trained with it.
        folder: an empty folder.
        base_model: the base's name for ``base_model_name_or_path``; ``None``: the name under which
            it was trained.

    Raises:
        UserError: there is no adapter, it is none of a known family, or on modules for which PEFT
            has no place.
    """
    import mlx.core as mx

    config, model, modules, places = _adapted(source)
    rank = int(config["lora_parameters"]["rank"])
    alpha = config["lora_parameters"]["scale"] * rank
    arrays = {
        f"{_PREFIX}{module}.{_PARTS[part]}": mx.contiguous(array.T)
        for module, parts in modules.items()
        for part, array in parts.items()
    }
    mx.save_safetensors(str(folder / WEIGHTS), arrays, metadata={"format": "pt"})
    layers = sorted({place.layer for place in places})
    some = len(layers) < len(model.layers)
    written: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or source.base,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets(places, model),
        "layers_to_transform": layers if some else None,
        "layers_pattern": "layers" if some else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": config.get("fine_tune_type") == "dora",
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
    import mlx.core as mx

    dequantize(model)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    arrays = read_arrays(folder / WEIGHTS)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, low in arrays.items():
        if not name.endswith(".lora_A.weight"):
            continue
        high = arrays[name.replace(".lora_A.", ".lora_B.")]
        path = name.removesuffix(".lora_A.weight")
        module = modules[path.removeprefix(_PREFIX)]
        dtype = module.weight.dtype
        weight = module.weight + config["lora_alpha"] / config["r"] * (high @ low)
        if config["use_dora"]:
            length = arrays[f"{path}.lora_magnitude_vector"]
            weight = (length / mx.linalg.norm(weight, axis=1))[:, None] * weight
        module.weight = weight.astype(dtype)
