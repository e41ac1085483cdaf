"""What kind of layer each block of a model is; found in the model, no weight is read.

Blocks of one model differ by their place: some see a window of the text only, some do not turn
positions, some are experts and some are not. Which is which stands in lists or in periods of
config.json, or in mlx-lm's code. Two blocks are of one kind where their modules hold the same
numbers and shapes, their caches are of one kind, and the model's own list of layer types, if it
has one, says the same of both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_fd.models.view import block_paths, find_blocks

# What a block is, by the names that it has it under.
Kind = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

# Numbers of a block's place, which say nothing of its kind.
_PLACES = (
    "layer_idx",
    "layer_id",
    "layer_index",
    "layer_number",
    "idx",
    "index",
    "num_hidden_layers",
)
_SCALARS = (bool, int, float, str, type(None))


def build(config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model of a configuration that it can read; its weights are never made."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(dict(config))
    return model_class(args_class.from_dict(copy.deepcopy(dict(config))))


def layer_kinds(model: nn.Module) -> list[Kind]:
    """The kind of each block of a model, in the order in which they run."""
    from mlx_lm.models.cache import make_prompt_cache

    blocks = find_blocks(model)
    kinds = [dict(_described(block)) for block in blocks]
    caches = make_prompt_cache(model)
    if len(caches) == len(blocks):  # some models have none for blocks without attention
        for kind, cache in zip(kinds, caches, strict=True):
            kind.update(_cache(cache))
    for name, values in _lists_beside(model, len(blocks)):
        for kind, value in zip(kinds, values, strict=True):
            kind[name] = value
    return kinds


def shapes_beside(model: nn.Module) -> Shapes:
    """Shapes of a model's weights that belong to no block, by their names."""
    from mlx.utils import tree_flatten

    paths = block_paths(model)
    inside = tuple(".".join(map(str, path)) + "." for path in paths)
    return {
        name: tuple(array.shape)
        for name, array in tree_flatten(model.parameters())
        if not name.startswith(inside)
    }


def difference(one: Kind, other: Kind) -> str:
    """In what two kinds differ first, for messages."""
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            return (
                f"{name} is {one.get(name)!r:.40} in the one, {other.get(name)!r:.40} in the other"
            )
    return "nothing"


def nearest(kinds: Sequence[Kind], wanted: Sequence[Kind], places: Sequence[int]) -> list[int]:
    """Indices, in ascending order, of blocks of the kinds that are wanted.

    Args:
        kinds: of the blocks that there are.
        wanted: of those to be chosen, in their order.
        places: for each of these the index that it would best have.

    Returns:
        Of all such choices the one with the least sum of squared distances from ``places``, of
        equals the first; empty where there is none.
    """
    costs: list[list[float]] = []
    for index, place in enumerate(places):
        best = 0.0 if index == 0 else float("inf")
        row = []
        for number, kind in enumerate(kinds):
            row.append(best + (number - place) ** 2 if kind == wanted[index] else float("inf"))
            if index:
                best = min(best, costs[-1][number])
        costs.append(row)
    chosen: list[int] = []
    end = len(kinds)
    for row in reversed(costs):
        number = int(np.argmin(row[:end])) if end else 0
        if not end or row[number] == float("inf"):
            return []
        chosen.append(number)
        end = number
    return chosen[::-1]


def _described(module: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers, names and shapes in a module and the modules in it."""
    yield f"{name}is", f"{type(module).__module__}.{type(module).__qualname__}"
    values = {**vars(module), **module}
    if {"scale_depth", "num_hidden_layers"} <= set(values):
        # minicpm scales by this ratio; neither number stands for itself.
        yield (
            f"{name}scale_depth",
            round(values.pop("scale_depth") / values["num_hidden_layers"] ** 0.5, 6),
        )
    for key, value in values.items():
        if key in _PLACES or key in ("_no_grad", "_training"):
            continue
        yield from _value(f"{name}{key}", value)


def _value(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield from _described(value, f"{name}.")
    elif isinstance(value, mx.array):
        # What is hidden from training is no weight: positions' turns, decays.
        constant = name.rpartition(".")[2].startswith("_")
        yield (
            name,
            tuple(np.array(value.astype(mx.float32)).ravel().tolist())
            if constant
            else tuple(value.shape),
        )
    elif isinstance(value, _SCALARS):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _value(f"{name}.{index}", one)
    elif callable(value):
        yield name, getattr(value, "__qualname__", type(value).__qualname__)


def _cache(cache: Any, name: str = "cache.") -> Iterator[tuple[str, Any]]:
    yield f"{name}is", type(cache).__qualname__
    for key, value in vars(cache).items():
        if isinstance(value, _SCALARS):
            yield f"{name}{key}", value
        elif isinstance(value, list | tuple):
            for index, one in enumerate(value):
                if hasattr(one, "__dict__"):
                    yield from _cache(one, f"{name}{key}.{index}.")


def _lists_beside(model: nn.Module, count: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lists with an entry for each block, of the module that holds the blocks."""
    holder: Any = model
    for key in block_paths(model)[0][:-2]:
        holder = holder[key] if isinstance(key, int) else getattr(holder, key)
    for name, value in {**vars(holder), **holder}.items():
        if not isinstance(value, list | tuple) or len(value) != count:
            continue
        if list(value) == list(range(count)):
            continue  # their places: gemma4 lists whose keys each block reads, here its own
        if all(isinstance(one, _SCALARS) for one in value):
            yield f"{name} of the model", value
