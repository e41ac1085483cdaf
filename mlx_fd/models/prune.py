"""A shallower student cut out of a model: some of its layers, its embedding, norm and head."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.models.directory import AGAIN, CONFIG, blaming, check_link
from mlx_fd.models.published_config import as_mlx_lm_reads, read_config, text_config
from mlx_fd.models.storage import new_directory

if TYPE_CHECKING:
    from mlx import nn

# Of what prune writes; another number where it writes other layers of the same model.
FORMAT = 2
# Everything that makes up a checkpoint beside its weights and config.json.
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Layers below this index are of one kind, the others of another.
_BORDERS = ("first_k_dense_replace", "num_dense_layers")
# Indices of the layers of one kind.
_INDEX_LISTS = ("full_attn_idxs", "mlp_only_layers")
# A list as long as the model is deep, and of something else.
_NO_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
# Parts of a multimodal model that no language model uses; they have layers of their own.
_NO_TEXT = ("vision", "visual", "audio", "multi_modal")


def kept_layers(total: int, count: int) -> list[int]:
    """Indices of ``count`` evenly spaced layers out of ``total``, first and last among them.

    They are round(linspace(0, total - 1, count)); a single layer is the first.
    """
    return [int(i) for i in np.round(np.linspace(0, total - 1, count))]


def renamed(name: str, new_index: dict[int, int], holder: str = "layers") -> str | None:
    """A weight's or module's name after pruning.

    Args:
        name: dotted name, as in ``model.layers.7.mlp.up_proj.weight``.
        new_index: index before -> index after, of the layers that stay.
        holder: what the model calls its list of layers.

    Returns:
        The new name; the same name for what belongs to no layer; ``None`` for a dropped layer.
    """
    parts = name.split(".")
    for place, (part, after) in enumerate(itertools.pairwise(parts), 1):
        if part == holder and after.isdecimal():
            index = new_index.get(int(after))
            return (
                None
                if index is None
                else ".".join([*parts[:place], str(index), *parts[place + 1 :]])
            )
    return name


def list_of_layers(model: nn.Module) -> str:
    """What a model calls its list of layers: ``layers`` mostly, or ``h`` or ``blocks``."""
    from mlx_fd.models.view import block_paths

    return next(part for part in reversed(block_paths(model)[0]) if isinstance(part, str))


# -------------------------------------------------------------------------------- which layers stay


def _pruned_config(
    config: Mapping[str, Any], kept: Sequence[int], total: int, holder: str = "layers"
) -> dict[str, Any]:
    """A configuration with the layers that stay, as mlx-lm reads it."""
    new_index = {old: new for new, old in enumerate(kept)}
    part = config.get("text_config")
    pruned = _pruned_part(config, kept, total)
    if isinstance(part, dict):
        pruned["text_config"] = _pruned_part(part, kept, total)
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            pruned[key] = {
                new: value
                for old, value in config[key].items()
                if (new := renamed(old, new_index, holder)) is not None
            }
    return pruned


def _pruned_part(part: Mapping[str, Any], kept: Sequence[int], total: int) -> dict[str, Any]:
    pruned = dict(part)
    new_index = {old: new for new, old in enumerate(kept)}
    for key, value in part.items():
        if key in _COUNTS and value == total:
            pruned[key] = len(kept)
        elif key == "max_window_layers" and not part.get("use_sliding_window"):
            pruned[key] = min(value, len(kept))  # it means nothing then
        elif key in (*_BORDERS, "max_window_layers") and isinstance(value, int):
            pruned[key] = sum(index < value for index in kept)
        elif key in _INDEX_LISTS and isinstance(value, list):
            pruned[key] = [new_index[index] for index in value if index in new_index]
        elif isinstance(value, list) and len(value) == total and key not in _NO_LAYERS:
            pruned[key] = [value[index] for index in kept]
        elif isinstance(value, str) and len(value) == total and key.endswith("pattern"):
            pruned[key] = "".join(value[index] for index in kept)
    if isinstance(part.get("scale_depth"), int | float):
        # minicpm divides by the square root of the number of layers.
        pruned["scale_depth"] = part["scale_depth"] * (len(kept) / total) ** 0.5
    return pruned


def _chosen(
    model_dir: Path, config: dict[str, Any], count: int, total: int
) -> tuple[list[int], dict[str, Any], str]:
    """Which layers stay, the configuration with them, and what the model calls its layers.

    They are evenly spaced where each of them is then of the kind that it was; else those nearest
    to that which keep their kinds.

    Raises:
        UserError: there are no such layers, or weights beside the layers depend on their number.
    """
    import mlx.core as mx

    from mlx_fd.models.layer_kinds import build, difference, layer_kinds, nearest, shapes_beside

    file = model_dir / CONFIG
    name = f"{model_dir}:layers={count}"
    with blaming(f"{file}: mlx-lm cannot make a model of it", AGAIN):
        whole = build(config)
    holder = list_of_layers(whole)
    kinds, even = layer_kinds(whole), kept_layers(total, count)
    if len(kinds) != total:
        raise UserError(
            f"{name}: the model has {len(kinds)} blocks, and config.json has {total} layers; it "
            "cannot be made shallower: choose another student"
        )

    def cut(source: Mapping[str, Any], kept: list[int]) -> tuple[dict[str, Any], Any]:
        pruned = as_mlx_lm_reads(_pruned_config(source, kept, total, holder), file)
        model = build(pruned)
        # Some look for their first full layer at a fixed place. Nothing is computed: MLX is lazy.
        model(mx.array([[0]]))
        return pruned, model

    lists, periods = _with_lists(config, total, file), _without_lists(config)
    reason = ""
    for source, moved in ((config, False), (lists, False), (config, True), (periods, True)):
        try:
            kept, (pruned, model) = even, cut(source, even)
            wanted = layer_kinds(model)
            if moved and (kept := nearest(kinds, wanted, even)):
                pruned, model = cut(config, kept)
        except Exception as error:  # mlx-lm's own checks of a configuration, of any kind
            reason = reason or " ".join(str(error).split())
            continue
        changed = [i for i, at in enumerate(kept or even) if layer_kinds(model)[i] != kinds[at]]
        beside = shapes_beside(model)
        resized = [key for key, shape in shapes_beside(whole).items() if beside.get(key) != shape]
        if resized:
            reason = reason or f"the size of {resized[0]} depends on the number of layers"
        elif changed:
            at = (kept or even)[changed[0]]
            what = difference(kinds[at], layer_kinds(model)[changed[0]])
            reason = reason or f"layer {at} would change its kind: {what}"
        elif kept:
            return kept, pruned, holder
    raise UserError(
        f"{name}: no {count} of its {total} layers make a model in which each is what it was: "
        f"{reason:.300}; take another number of layers or another student"
    )


def _with_lists(config: Mapping[str, Any], total: int, file: Path) -> dict[str, Any]:
    """With the lists of layers, too, that mlx-lm makes itself where they are missing."""
    made = text_config(config, file)
    part = config.get("text_config")
    inner = dict(part) if isinstance(part, dict) else dict(config)
    for key, value in made.items():
        if isinstance(value, list) and len(value) == total:
            inner.setdefault(key, value)
            inner[key] = inner[key] or value
    return {**config, "text_config": inner} if isinstance(part, dict) else inner


def _without_lists(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lists of layers: where there is a period, that alone says their kinds."""

    def bare(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != "layer_types"}

    part = config.get("text_config")
    inner = {"text_config": bare(part)} if isinstance(part, dict) else {}
    return {**bare(config), **inner}


# ----------------------------------------------------------------------------------- the directory


def prune(model_dir: Path, layers: int, out_dir: Path) -> None:
    """Write the checkpoint of a model with fewer layers, its weights otherwise untouched.

    Each layer stays what it was: one that reads a window still does, one that does not turn
    positions still does not. The layers are those of :func:`kept_layers` where that is so, else
    the nearest ones. ``config.json`` records them, and where they came from, under ``"mlx_fd"``.
    Whoever changes the weights afterwards must drop that entry. Of a multimodal model only the
    language model's weights are written.

    Args:
        model_dir: an mlx-lm model directory.
        layers: how many layers stay, from 1 to as many as there are.
        out_dir: the directory to make; it appears complete or not at all.

    Raises:
        UserError: ``layers`` is out of range, no choice of layers keeps their kinds, or the
            model's files cannot be read.
    """
    from mlx_fd.models.backend import backend

    backend()
    import mlx.core as mx
    from mlx_lm.utils import _encode_tagged_floats

    config = read_config(model_dir)
    part = text_config(config, model_dir / CONFIG)
    total = next((part[name] for name in _COUNTS if isinstance(part.get(name), int)), None)
    if total is None:
        raise UserError(f"{model_dir}/{CONFIG} lacks {_COUNTS[0]}")
    if not 1 <= layers <= total:
        raise UserError(f"{model_dir} has {total} layers: layers={layers} must be 1 to {total}")
    copied = [file for file in sorted(model_dir.iterdir()) if file.suffix in _COPIED]
    for file in copied:
        check_link(file)
    kept, pruned, holder = _chosen(model_dir, config, layers, total)
    pruned["mlx_fd"] = {"source": str(model_dir.resolve()), "layers": kept}
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
                if not any(word in old for word in _NO_TEXT)
                and (new := renamed(old, new_index, holder)) is not None
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
        for file in copied:
            if not (working / file.name).exists():
                shutil.copyfile(file, working / file.name)
        text = json.dumps(_encode_tagged_floats(pruned), indent=1)
        (working / CONFIG).write_text(text, encoding="utf-8")
