"""How many tokens each model reads and writes, in which part of the work, and what that takes.

Nothing is computed for it: the shapes of a model's calls say it all. A call with one token for each
conversation is a step of writing, and so is one in which proposed tokens are tried; every other one
reads.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_fd.models.view import View

WRITING, READING, MEASURING, LEARNING = "writing", "reading", "measuring", "learning"
OTHER = "other"
Function = TypeVar("Function", bound=Callable[..., Any])
_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)


@dataclass
class Meter:
    """What was done while it was open.

    Attributes:
        read: places of texts that a model's forward passes had, padding too, by the part of the
            work and the model.
        written: places of steps of writing, likewise.
        steps: steps of writing.
        seconds: by part of the work; in :data:`OTHER` all that is none.
        processor: the same of all processors of this process.
        stepping: whether a call of any length is a step of writing.
    """

    read: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: Counter[tuple[str, str]] = field(default_factory=Counter)
    steps: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    stepping: bool = False
    _parts: list[str] = field(default_factory=lambda: [OTHER])
    _since: tuple[float, float] = field(
        default_factory=lambda: (time.perf_counter(), time.process_time())
    )

    def count(self, model: str, final: mx.array) -> None:
        """Take note of a call of a model that gave these final hidden states [B, T, d]."""
        rows, length, _ = final.shape
        key = self._parts[-1], model
        if length == 1 or self.stepping:
            self.steps[key] += 1
            self.written[key] += rows * length
        else:
            self.read[key] += rows * length

    def begin(self, part: str) -> None:
        """What follows is a part of the work, until :meth:`end`."""
        self._stop()
        self._parts.append(part)

    def end(self) -> None:
        """What follows is the part that was interrupted."""
        self._stop()
        self._parts.pop()

    def _stop(self) -> None:
        part, now = self._parts[-1], (time.perf_counter(), time.process_time())
        for of, then, since in zip((self.seconds, self.processor), now, self._since, strict=True):
            of[part] = of.get(part, 0.0) + then - since
        self._since = now


@contextmanager
def metered(views: Mapping[str, View]) -> Iterator[Meter]:
    """Count what models do while this is open.

    Args:
        views: the models by what to call them; one that is there twice counts under its last name.
    """
    meter = Meter()
    with ExitStack() as stack:
        for name, view in views.items():
            stack.enter_context(view.watched(functools.partial(meter.count, name)))
        token = _METER.set(meter)
        try:
            yield meter
        finally:
            _METER.reset(token)
            meter.begin(OTHER)


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done while this is open counts as a part of the work, where somebody counts."""
    meter = _METER.get()
    if meter is None:
        yield
        return
    meter.begin(name)
    try:
        yield
    finally:
        meter.end()


@contextmanager
def step_of_several() -> Iterator[None]:
    """A call in here is a step of writing, whatever number of tokens it is of."""
    meter = _METER.get()
    if meter is None:
        yield
        return
    meter.stepping = True
    try:
        yield
    finally:
        meter.stepping = False


def counted(name: str) -> Callable[[Function], Function]:
    """Make all that a function does a :func:`part` of the work."""

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with part(name):
                return function(*args, **kwargs)

        return cast(Function, call)

    return decorated
