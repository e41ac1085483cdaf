"""A model by its shapes alone, made by mlx-lm's own class: nothing is allocated, nothing computed.

MLX makes arrays when they are evaluated, and these never are. So the numbers hold for whatever
architecture mlx-lm has: mixtures of experts, tied heads, mixed bits, sliding windows, states.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd.models.directory import AGAIN, CONFIG, blaming
from mlx_fd.models.published_config import as_mlx_lm_reads
from mlx_fd.models.view import block_states

CACHE_STEP = 256
"""Tokens by which mlx-lm's caches grow."""
# What quantize_config calls a way to pack weights -> what mlx-lm makes of it.
_METHODS: dict[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "modelopt": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model that a configuration describes, quantised as it says; its arrays stay unmade.

    Args:
        config: config.json, as it is published.

    Raises:
        UserError: mlx-lm does not know the architecture, or an entry is missing or wrong.
    """
    from mlx_lm.utils import _get_classes

    config = as_mlx_lm_reads(config, Path(CONFIG))
    with blaming(f"{CONFIG} does not describe a model that mlx-lm knows", AGAIN):
        model_class, arguments = _get_classes(config=config)
        model: nn.Module = model_class(arguments.from_dict(copy.deepcopy(config)))
        model.set_dtype(_stored_type(config))
        packing = _packing(config)
        if packing:
            _quantize(model, packing, config)
    model.eval()
    return model


def _stored_type(config: Mapping[str, Any]) -> mx.Dtype:
    text = config.get("text_config") or {}
    named = [of.get(key) for of in (config, text) for key in ("torch_dtype", "dtype")]
    name = next((name for name in named if name), "bfloat16")
    return {"float32": mx.float32, "float16": mx.float16}.get(str(name), mx.bfloat16)


def _packing(config: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are packed where nothing else is said of them; empty: they are not."""
    if quantization := config.get("quantization"):
        return dict(quantization)
    how = config.get("quantization_config") or {}
    if "bits" in how and "group_size" in how:  # awq, and what mlx-lm writes
        return {"group_size": how["group_size"], "bits": how["bits"], "mode": "affine"}
    return dict(_METHODS.get(how.get("quant_method", ""), {}))


def _quantize(model: nn.Module, packing: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Quantise as mlx-lm does when it opens a model, and as it had done when it was written."""
    left_out = (config.get("quantization_config") or {}).get("modules_to_not_convert") or ()
    chosen = getattr(model, "quant_predicate", None)

    def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in packing:
            said: bool | dict[str, Any] = packing[path]
            return said
        if not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % packing["group_size"]:
            return False
        if any(path == name or fnmatchcase(path, f"{name}*") for name in left_out):
            return False
        return True if chosen is None else bool(chosen(path, module))

    nn.quantize(
        model,
        group_size=packing["group_size"],
        bits=packing["bits"],
        mode=packing.get("mode", "affine"),
        class_predicate=choice,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are in memory once it is loaded."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def hidden_width(model: nn.Module) -> int:
    """The size d of a model's hidden states, with or without weights."""
    return int(block_states(model, mx.zeros((1, 1), dtype=mx.int32))[-1].shape[-1])


def logit_rows(model: nn.Module) -> int:
    """How many logits a model makes of each token, with or without weights."""
    logits: mx.array = model(mx.zeros((1, 1), dtype=mx.int32), cache=None)
    return int(logits.shape[-1])


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of one conversation's prompt cache, asked of mlx-lm's cache objects.

    Args:
        model: with or without weights.
        tokens: that the conversation has.

    Returns:
        Keys and values as they are stored (room for more tokens included, sliding windows no longer
        than they are), and states of whatever size.
    """
    return sum(int(cache.nbytes) for cache in filled_caches(model, 1, tokens) if cache is not None)


def filled_caches(model: nn.Module, count: int, tokens: int) -> list[Any]:
    """Prompt caches that hold some tokens already, all of them zeros; nothing is evaluated.

    Args:
        model: with or without weights.
        count: conversations side by side.
        tokens: of each; 0: the caches are empty.
    """
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(model)
    if not tokens:
        return caches
    seen: list[Any] = make_prompt_cache(model)
    model(mx.zeros((count, 1), dtype=mx.int32), cache=seen)
    return [_filled(empty, one, tokens) for empty, one in zip(caches, seen, strict=True)]


def _filled(empty: Any, one: Any, tokens: int) -> Any:
    """A layer's cache that has seen some tokens, from one that has seen none and one with one."""
    if hasattr(one, "caches"):
        parts = zip(empty.caches, one.caches, strict=True)
        empty.caches = tuple(_filled(*pair, tokens) for pair in parts)
        return empty
    keys, values = getattr(one, "keys", None), getattr(one, "values", None)
    if not (isinstance(keys, mx.array) and isinstance(values, mx.array)):
        return one  # a state, which has the same size whatever it has seen
    window = getattr(empty, "max_size", None)
    if window is not None:  # it grows in steps, too, and no further than this
        tokens = min(-(-tokens // CACHE_STEP) * CACHE_STEP, window)
    empty.update_and_fetch(
        *(mx.zeros((*a.shape[:2], tokens, a.shape[3]), a.dtype) for a in (keys, values))
    )
    return empty
