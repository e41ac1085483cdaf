"""Jinja's sandbox with bounds: no single operation of a template takes much time or memory.

A template that was tried may still do with some text what it did with no other. Between its lines
there is a deadline; within a line these bounds hold. Nothing that a template makes is larger than
:data:`MAX_SIZE`, lists with all that is in them, and what would be is refused before it is made.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jinja2 import nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 4 << 20
"""The most characters of anything in a template: as of all that it may write."""
# What an element of a list counts as: looking at one takes longer than at a character.
_ELEMENT = 32
_MAX_BITS = 1 << 16
_MAX_WIDTH = 10_000
# Filters and methods that pad, repeat or round: by a width, or a text that stands for one.
_PADDING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"}
    | {"indent", "wordwrap", "batch", "slice", "round", "tojson"}
)
_MAX_PADDED = 16 * MAX_SIZE
_FORMATTING = ("format", "format_map")
_TABLE = "translate"  # replaces characters by texts of any length
# A width in a format, and one that is an argument.
_WIDE = re.compile(r"%[^%a-zA-Z]*\d{5}|\{[^{}]*\d{5}")
_WIDTH_GIVEN = re.compile(r"%[^%a-zA-Z*]*+\*|\{[^{}:]*+:[^{}]*+\{")
_LONG_NUMBER = re.compile(r"\d{5}")


class TooLarge(MemoryError):
    """Something in a template is larger than anything in one need be."""


def size(value: Any) -> int:
    """Characters of a value with all that is in it, each element for some.

    Raises:
        TooLarge: they are more than :data:`MAX_SIZE`, or a whole number has too many digits.
    """
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            rest += one
        elif isinstance(one, int) and one.bit_length() > _MAX_BITS:
            raise TooLarge
        total += _ELEMENT
        _check(total + _ELEMENT * len(rest))
    return total


def _check(total: int) -> None:
    if total > MAX_SIZE:
        raise TooLarge


def _kept(value: Any) -> Any:
    """A value that is not too large; what an iterator gives is looked at as it comes."""
    if isinstance(value, types.GeneratorType):
        return _counted(value)
    size(value)
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    total = 0
    for value in values:
        total += size(value)
        _check(total)
        yield value


def _joined(pieces: Iterable[Any]) -> str:
    """The texts of values, one after the other."""
    texts, total = [], 0
    for piece in pieces:
        size(piece)
        texts.append(str(piece))
        total += len(texts[-1])
        _check(total)
    return "".join(texts)


def _check_format(form: str, given: Sequence[Any]) -> None:
    """Make sure that a format has no wide field, and not one thing many times."""
    said = str(given)
    if _WIDE.search(form) or (_WIDTH_GIVEN.search(form) and _LONG_NUMBER.search(said)):
        raise TooLarge
    _check((form.count("%") + form.count("{")) * len(said))


def _check_call(name: str, value: Any, given: Sequence[Any]) -> None:
    """Make sure that a filter or a method makes nothing large.

    Args:
        name: its name.
        value: what it is applied to.
        given: its arguments.
    """
    for one in (value, *given):
        size(one)
    if name in _PADDING:
        widths = [
            abs(one) if isinstance(one, int) else len(one)
            for one in given
            if isinstance(one, int | str)
        ]
        if max(widths, default=0) > _MAX_WIDTH:
            raise TooLarge
        if size(value) * max(widths, default=1) > _MAX_PADDED:
            raise TooLarge
    elif name == "replace" and len(given) > 1:
        _check(str(value).count(str(given[0])) * len(str(given[1])))
    elif name in _FORMATTING:
        _check_format(str(value), given)


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes nothing large.

    Args:
        name: its name.
        function: what it does.
    """
    # Some are handed Jinja's own state before the value.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            _check_call(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return _kept(function(*args, **kwargs))

    return keeping


@pass_eval_context
def _join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's filter ``join``."""
    pieces = list(value)
    _check(size(pieces) + len(pieces) * len(d))
    return str(FILTERS["join"](context, pieces, d, attribute))


class _Generator(CodeGenerator):
    """Jinja's compiler; what joins or gathers values asks the environment, too."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.kept(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.kept(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        made = node.ctx == "load"  # else it is what a value is taken apart into
        self.write("environment.kept(" if made else "")
        super().visit_Tuple(node, frame)
        self.write(")" if made else "")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which every operation keeps to the bounds."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_joined)
    kept = staticmethod(_kept)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It writes as many paragraphs as it is told to.
        del self.globals["lipsum"]
        self.filters = {name: bounded(name, one) for name, one in FILTERS.items()}
        self.filters["join"] = _join

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's, where the result is not too large."""
        sizes = size(left), size(right)
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and right > 1:
            _check_bits(left.bit_length() * right)
        elif operator == "*" and not whole:
            for value, times in ((sizes[0], right), (sizes[1], left)):
                _check(value * times if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check_format(left, (right,))
        return _kept(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in Jinja, without what makes texts of a table."""
        return attr != _TABLE and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Jinja's, where the result is not too large."""
        name = getattr(__obj, "__name__", "")
        # The sandbox has a function of its own for a text's format.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            if name == "join":
                args = tuple(list(one) for one in args)
                _check(sum(size(one) + len(one) * size(owner) for one in args))
            _check_call(name, owner, (*args, *kwargs.values()))
        return _kept(super().call(__context, __obj, *args, **kwargs))


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TooLarge
