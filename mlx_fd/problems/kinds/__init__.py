"""Kinds of answers, one file each: how a reply is to end, what is read from it, what is right.

A value is text in the kind's own canonical form (a number's is that of ``fractions.Fraction``), so
that rows, votes and bundles need not know kinds. What cannot be read is ``None`` and never a guess.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mlx_fd import registry
from mlx_fd.problems import Problem
from mlx_fd.problems.prompts import Form
from mlx_fd.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class AnswerKind(Entry):
    """What an answer is.

    Attributes:
        form: how a reply is asked for.
        read: the final answer of a reply to a problem, and how it is to be found (``auto``; of
            numbers ``strict`` and ``flexible``, too); ``None`` where it has none.
        same: whether a final answer is the right one of a problem.
        gold: the canonical form of a right answer as a file has it, given what there is to choose
            from; ``ValueError`` with the reason where it is none of this kind.
        available: raises :class:`mlx_fd.errors.UserError` where what it needs is not installed or
            not allowed.
        graded: whether there are right answers at all.
        exclusive: whether of two different final answers one at least is wrong, as of two numbers;
            of two programs both may be right.
        alike: whether two final answers are the same one, as two ways to write a formula are; by
            default they are where their canonical forms are.
    """

    form: Form
    read: Callable[[str, Problem, str], str | None]
    same: Callable[[str, Problem], bool]
    gold: Callable[[Any, tuple[str, ...]], str]
    available: Callable[[], None] = lambda: None
    graded: bool = True
    exclusive: bool = True
    alike: Callable[[str, str], bool] = operator.eq


KINDS: Registry[AnswerKind] = registry.KINDS
register_kind = KINDS.register


def kind_of(problem: Problem) -> AnswerKind:
    """The kind of a problem's answer."""
    return KINDS[problem.kind]


def form_of(problem: Problem) -> Form:
    """How a reply to a problem is asked for."""
    return KINDS[problem.kind].form


def read_final(text: str, problem: Problem, how: str = "auto") -> str | None:
    """The final answer of a reply, in its kind's canonical form; ``None`` where it has none."""
    return KINDS[problem.kind].read(text, problem, how)


def is_right(final: str | None, problem: Problem) -> bool | None:
    """Whether a final answer is right; one that could not be read is wrong.

    ``None``: nobody knows, since problems of this kind have no right answers.
    """
    kind = KINDS[problem.kind]
    if not kind.graded:
        return None
    return final is not None and kind.same(final, problem)


def is_comparable(final: str | None, problem: Problem) -> bool:
    """Whether a final answer was read, and another one that differs says that it may be wrong."""
    return final is not None and kind_of(problem).exclusive


def same_final(one: str | None, other: str | None, problem: Problem) -> bool | None:
    """Whether two final answers to a problem are one.

    ``None``: one of them could not be read, or answers of this kind differ and are right all the
    same.
    """
    if one is None or other is None or not is_comparable(one, problem):
        return None
    return kind_of(problem).alike(one, other)


def votes(finals: Iterable[str | None], problem: Problem) -> list[str | None]:
    """Final answers to a problem, those that are alike in the form in which the first came."""
    alike, seen = kind_of(problem).alike, dict[str, str]()
    found: list[str | None] = []
    for final in finals:
        if final is not None and final not in seen:
            same = (one for one in dict.fromkeys(seen.values()) if alike(one, final))
            seen[final] = next(same, final)
        found.append(None if final is None else seen[final])
    return found


def are_graded(problems: Iterable[Problem]) -> bool:
    """Whether problems have right answers; a source's all have, or none has."""
    return all(KINDS[problem.kind].graded for problem in problems)


def known(rights: Iterable[bool | None]) -> list[bool]:
    """Without those of which nobody knows whether they are right."""
    return [right for right in rights if right is not None]
