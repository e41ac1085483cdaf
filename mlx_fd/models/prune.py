"""A shallower student cut out of a model: some of its layers, its embedding, norm and head."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.models.directory import AGAIN, blaming
from mlx_fd.models.storage import new_directory

_LAYER = re.compile(r"(^|\.)layers\.(\d+)(?=\.|$)")
# Everything that makes up a checkpoint beside its weights and config.json.
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def kept_layers(total: int, count: int) -> list[int]:
    """Indices of ``count`` evenly spaced layers out of ``total``, first and last among them.

    They are round(linspace(0, total - 1, count)); a single layer is the first.
    """
    return [int(i) for i in np.round(np.linspace(0, total - 1, count))]


def renamed(name: str, new_index: dict[int, int]) -> str | None:
    """A weight's or module's name after pruning.

    Args:
        name: dotted name, as in ``model.layers.7.mlp.up_proj.weight``.
        new_index: index before -> index after, of the layers that stay.

    Returns:
        The new name; the same name for what belongs to no layer; ``None`` for a dropped layer.
    """
    match = _LAYER.search(name)
    if match is None:
        return name
    index = new_index.get(int(match[2]))
    if index is None:
        return None
    return f"{name[: match.start(2)]}{index}{name[match.end(2) :]}"


def _pruned_config(config: dict[str, Any], kept: list[int], source: Path) -> dict[str, Any]:
    new_index = {old: new for new, old in enumerate(kept)}
    pruned = {**config, "num_hidden_layers": len(kept)}
    if isinstance(config.get("layer_types"), list):
        pruned["layer_types"] = [config["layer_types"][i] for i in kept]
    if "max_window_layers" in config:
        pruned["max_window_layers"] = min(config["max_window_layers"], len(kept))
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            pruned[key] = {
                new: value
                for old, value in config[key].items()
                if (new := renamed(old, new_index)) is not None
            }
    pruned["mlx_fd"] = {"source": str(source.resolve()), "layers": kept}
    return pruned


def prune(model_dir: Path, layers: int, out_dir: Path) -> None:
    """Write the checkpoint of a model with fewer layers, its weights otherwise untouched.

    The layers are those of ``kept_layers``; ``config.json`` records them, and where they came
    from, under ``"mlx_fd"``. Whoever changes the weights afterwards must drop that entry.

    Args:
        model_dir: an mlx-lm model directory.
        layers: how many layers stay, from 1 to as many as there are.
        out_dir: the directory to make; it appears complete or not at all.

    Raises:
        UserError: ``layers`` is out of range, or the model's files cannot be read.
    """
    from mlx_fd.models.backend import backend

    backend()
    import mlx.core as mx

    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        total = int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model_dir}/config.json is missing or lacks num_hidden_layers") from error
    if not 1 <= layers <= total:
        raise UserError(f"{model_dir} has {total} layers: layers={layers} must be 1 to {total}")
    kept = kept_layers(total, layers)
    new_index = {old: new for new, old in enumerate(kept)}
    with new_directory(out_dir) as working:
        weight_map: dict[str, str] = {}
        size = 0
        for shard in sorted(model_dir.glob("model*.safetensors")):
            with blaming(f"{shard} cannot be read", AGAIN):
                weights = mx.load(str(shard))
            stay = {
                new: array
                for old, array in cast("dict[str, mx.array]", weights).items()
                if (new := renamed(old, new_index)) is not None
            }
            if not stay:
                continue
            weight_map.update(dict.fromkeys(stay, shard.name))
            size += sum(array.nbytes for array in stay.values())
            mx.save_safetensors(str(working / shard.name), stay, metadata={"format": "mlx"})
        if not weight_map:
            raise UserError(f"{model_dir} has no model*.safetensors")
        (working / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1),
            encoding="utf-8",
        )
        for file in model_dir.iterdir():
            if file.suffix in _COPIED and not (working / file.name).exists():
                shutil.copyfile(file, working / file.name)
        with blaming(f"{model_dir}/config.json does not fit its {total} layers"):
            pruned = _pruned_config(config, kept, model_dir)
        (working / "config.json").write_text(json.dumps(pruned, indent=1), encoding="utf-8")
