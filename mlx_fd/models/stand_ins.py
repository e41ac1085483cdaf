"""What stands in for modules of a model while it runs: outputs are kept, given or silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_fd.models.attention_taps import Attentions, recorded

# Where a module stands: attributes and indices from the model down to it.
ModulePath = tuple[str | int, ...]


class StandIn:
    """Stands in for a module of a model, and has everything else of it."""

    def __init__(self, module: nn.Module):
        self._module = module

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Some models ask isinstance of which kind a block is (olmo_hybrid).
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._module


class Tap(StandIn):
    """Stands in for a block: calls it, and keeps what came out, and its attention where asked."""

    def __init__(
        self,
        block: nn.Module,
        layers: list[mx.array],
        recompute: bool,
        attention: list[Attentions] | None = None,
    ):
        super().__init__(block)
        self._call = nn.utils.checkpoint(block) if recompute else block
        self._layers = layers
        self._attention = attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives."""
        if not self._layers:
            self._layers.append(hidden_states((*args, *kwargs.values())))
        # What a block leaves in a cache for others is lost to a gradient that runs it again.
        call = self._call if _is_plain((args, kwargs)) else self._module
        if self._attention is None:
            out = call(*args, **kwargs)
        else:
            with recorded() as calls:
                out = self._module(*args, **kwargs)
            self._attention.append(tuple(calls))
            if call is not self._module:
                # The gradient of what is run again does not go through what was seen of it; of the
                # first run no more is computed than queries and keys.
                out = call(*args, **kwargs)
        self._layers.append(hidden_states(out))
        return out


class Recorder(StandIn):
    """Stands in for a module: calls it, and tells what came out."""

    def __init__(self, module: nn.Module, tell: Callable[[Any], None]):
        super().__init__(module)
        self._tell = tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        out = self._module(*args, **kwargs)
        self._tell(out)
        return out


class Returns(StandIn):
    """Stands in for a module: gives what it was told to, whatever it is given."""

    def __init__(self, module: nn.Module, value: mx.array):
        super().__init__(module)
        self._value = value

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """The given value."""
        return self._value


class Silent(StandIn):
    """Stands in for a head: its product is 0, however a model makes it. It still embeds tokens."""

    def __init__(self, module: nn.Module, rows: int):
        super().__init__(module)
        self._rows = rows

    def __call__(self, states: mx.array) -> mx.array:
        """Embeddings of tokens, or logits of 0."""
        embeds = hasattr(self._module, "as_linear")
        return self._module(states) if embeds else self.as_linear(states)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """Logits of 0, [..., rows]."""
        return mx.zeros((*hidden.shape[:-1], self._rows), hidden.dtype)

    @property
    def weight(self) -> mx.array:
        """Zeros of the shape of the head's own."""
        weight: mx.array = self._module.weight
        return mx.broadcast_to(mx.zeros((), weight.dtype), weight.shape)


def _is_plain(value: Any) -> bool:
    """Whether something is made of arrays and what cannot be changed: no cache is among it."""
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (mx.array, str, int, float))


def _first_array(value: Any) -> mx.array:
    """An array, or the first one of several: a block may give its state beside its output."""
    if isinstance(value, mx.array):
        return value
    parts = value if isinstance(value, (tuple, list)) else ()
    found = next((part for part in parts if isinstance(part, mx.array)), None)
    if found is None:
        raise TypeError(f"no array in {type(value).__name__}")
    return found


def hidden_states(value: Any) -> mx.array:
    """The hidden states [B, T, d] in what a block is given or gives.

    Gemma 3n's blocks pass on several streams [n, B, T, d], of which the first is the one that
    predicts; transformers gives the same for its hidden states.
    """
    found = _first_array(value)
    return found[0] if found.ndim == 4 else found


def module_at(model: nn.Module, path: ModulePath) -> Any:
    """The module, or what holds modules, at a path."""
    part: Any = model
    for key in path:
        part = part[key]
    return part


@contextmanager
def replaced(model: nn.Module, stand_ins: Mapping[ModulePath, Any]) -> Iterator[None]:
    """Other things in place of some modules, for a while.

    A module is a dictionary: its entries are set as such, to keep their order and leave alone what
    ``nn.Module`` does where an attribute is set.
    """
    holders = [(module_at(model, path[:-1]), path[-1]) for path in stand_ins]
    before = [
        dict.get(holder, key) if isinstance(holder, dict) else holder[key]
        for holder, key in holders
    ]
    try:
        for (holder, key), stand_in in zip(holders, stand_ins.values(), strict=True):
            _put(holder, key, stand_in)
        yield
    finally:
        for (holder, key), module in zip(holders, before, strict=True):
            _put(holder, key, module)


def _put(holder: Any, key: str | int, value: Any) -> None:
    if isinstance(holder, dict):
        dict.__setitem__(holder, key, value)
    else:
        holder[key] = value


def modules(part: Any, path: ModulePath = ()) -> Iterator[tuple[ModulePath, nn.Module]]:
    """Every module of a model with its path, whatever lists or dictionaries hold it."""
    if isinstance(part, nn.Module):
        yield path, part
    if isinstance(part, dict):
        children: Iterable[tuple[str | int, Any]] = part.items()
    elif isinstance(part, list):
        children = enumerate(part)
    else:
        return
    for key, child in children:
        yield from modules(child, (*path, key))
