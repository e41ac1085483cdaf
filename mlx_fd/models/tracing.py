"""How much memory a computation takes, found from its graph; nothing is computed or allocated.

MLX says which operations a function comes to, in order, with the shape and type of every array.
Going through them and counting what is still needed gives the peak, for any architecture and
backend: 0.9 to 1.2 times what was measured (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_fd.models import cpu_math

# Their result is their first input, seen otherwise.
_VIEWS = {
    *("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Slice", "Split", "StopGradient"),
    *("AsStrided", "Transpose", "Copy", "Flatten", "Unflatten", "Reshape", "Contiguous", "View"),
}
# Of those: what leaves the elements in another order, and what copies where they are.
_REORDERS = {"Broadcast", "BroadcastAxes", "Slice", "Split", "AsStrided", "Transpose"}
_NEEDS_ORDER = {"Flatten", "Unflatten", "Reshape", "Contiguous", "View"}
# Their result takes the place of an input that nothing else needs.
_IN_PLACE = {
    *("Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power", "Select", "AsType"),
    *("Exp", "Log", "Sqrt", "Sigmoid", "Square", "Negative", "Tanh", "Erf", "Cos", "Sin", "Abs"),
    *("Softmax", "LogicalNot", "LogicalAnd", "Sign"),
}
# Operations that MLX has begun before it lets go of what the first of them needed: at most 10
# tasks of 10 operations wait for a device.
_IN_FLIGHT = 100
# A graph that grows with the number of tokens is made for these only.
_SHORT = (16, 32, 64)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Traced:
    """What a computation takes beside its inputs, in bytes.

    Attributes:
        peak: at most.
        kept: of its results.
        made: of all its arrays together, were none let go.
        first: when the first result is there, that of a loss before its gradient.
        operations: in its graph.
    """

    peak: int
    kept: int
    made: int
    first: int
    operations: int


def trace(model: nn.Module, function: Function, *inputs: mx.array) -> Traced:
    """The memory that a function of a model and inputs takes.

    Args:
        model: its parameters may be anywhere, also on the disk or nowhere yet.
        function: gives a tree of arrays of the inputs; it may evaluate nothing.
        inputs: of which only shapes and types matter.

    Returns:
        What it takes beside the parameters and inputs.

    Raises:
        ValueError: the graph has an operation that MLX cannot describe.
    """
    parameters = tree_flatten(model.parameters())
    names = [name for name, _ in parameters]
    arrays = [array for _, array in parameters]
    was_training = model.training

    def flat(*given: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(names, given[: len(names)], strict=True))))
        results = tree_flatten(function(*given[len(names) :]))
        return [array for _, array in results if isinstance(array, mx.array)]

    found: list[dict[str, Any]] = []
    contiguous = mx.contiguous
    try:
        # MLX cannot describe this copy (of Qwen3.5's states); a sum is one of the same size.
        vars(mx)["contiguous"] = lambda array, *_, **__: array + mx.zeros((), array.dtype)
        with cpu_math.uninstalled():
            mx.export_function(found.append, flat, *arrays, *inputs)
    except RuntimeError as error:  # what a device has in place of an operation
        raise ValueError(f"MLX cannot describe this: {error}") from error
    finally:
        vars(mx)["contiguous"] = contiguous
        model.update(tree_unflatten(parameters))
        model.train(was_training)
    return _walk(found)


def _walk(found: Sequence[Mapping[str, Any]]) -> Traced:
    """Go through a graph as MLX describes it, in the order in which it is computed."""
    operations = [one for one in found if one["type"] == "primitive"]
    given = {
        array[0]
        for one in found
        if one["type"] in ("inputs", "keyword_inputs", "constants")
        for array in one.get("inputs", one.get("constants", ()))
    }
    results = [array[0] for one in found if one["type"] == "outputs" for array in one["outputs"]]
    place, sizes = _places(operations)
    inputs = [{place.get(array[0], array[0]) for array in one["inputs"]} for one in operations]
    uses: dict[str, int] = {}
    needed_by = (*(array for of_one in inputs for array in of_one), *results)
    for array in (place.get(array, array) for array in needed_by):
        uses[array] = uses.get(array, 0) + 1
    used = peak = first = 0
    wanted = place.get(results[0], results[0])
    leaving: deque[int] = deque()
    for one, needed in zip(operations, inputs, strict=True):
        made = [array for array, *_ in one["outputs"] if place[array] == array]
        new = sum(sizes[array] for array in made)
        free = 0
        for array in needed:
            uses[array] -= 1
            if not uses[array] and array not in given:
                if new and one["name"] in _IN_PLACE and sizes[array] == new:
                    new = 0
                else:
                    free += sizes[array]
        used += new
        peak = max(peak, used)
        leaving.append(free + sum(sizes[array] for array in made if not uses.get(array)))
        if len(leaving) > _IN_FLIGHT:
            used -= leaving.popleft()
        if wanted in made:
            first = used - sum(leaving)
    return Traced(peak, used - sum(leaving), sum(sizes.values()), first, len(operations))


def _places(operations: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, int]]:
    """Each array -> the one whose memory it is in; and the bytes of those."""
    place: dict[str, str] = {}
    sizes: dict[str, int] = {}
    reordered: set[str] = set()
    for one in operations:
        name, inputs = one["name"], [array[0] for array in one["inputs"]]
        for index, (array, shape, dtype) in enumerate(one["outputs"]):
            source = None
            if name == "CustomTransforms":
                source = inputs[index - len(one["outputs"])]
            elif name == "Depends":
                source = inputs[index]
            elif (
                name in _VIEWS and inputs and not (name in _NEEDS_ORDER and inputs[0] in reordered)
            ):
                source = inputs[0]
            if source is None:
                place[array], sizes[array] = array, math.prod(shape) * dtype.size
            else:
                place[array] = place.get(source, source)
                if name in _REORDERS or source in reordered:
                    reordered.add(array)
    return place, sizes


def grows_with_length(trace_of: Callable[[int], Traced]) -> bool:
    """Whether a computation over tokens has operations for each of them (a recurrence)."""
    return trace_of(_SHORT[0]).operations != trace_of(_SHORT[1]).operations


def trace_by_length(trace_of: Callable[[int], Traced], tokens: int, *, grows: bool) -> Traced:
    """A computation over a number of tokens, also where its graph has operations for each of them.

    Such a graph would be too large to go through. Its memory is a polynomial of the second degree
    in the tokens, as attention's scores are, so three short ones tell.

    Args:
        trace_of: traces the computation over some tokens.
        tokens: how many.
        grows: of :func:`grows_with_length`.
    """
    if not grows or tokens <= _SHORT[-1]:
        return trace_of(tokens)
    short = [trace_of(length) for length in _SHORT]
    peak, kept, made, first = (
        _extrapolated([getattr(one, name) for one in short], tokens)
        for name in ("peak", "kept", "made", "first")
    )
    return Traced(max(peak, kept), kept, made, first, short[-1].operations)


def _extrapolated(values: Sequence[int], at: int) -> int:
    """Lagrange's polynomial through the values at ``_SHORT``; never below the last one's line."""
    total = 0.0
    for index, value in enumerate(values):
        others = [x for place, x in enumerate(_SHORT) if place != index]
        total += value * math.prod((at - x) / (_SHORT[index] - x) for x in others)
    line = values[-1] + (values[-1] - values[-2]) / (_SHORT[-1] - _SHORT[-2]) * (at - _SHORT[-1])
    return math.ceil(max(total, line))
