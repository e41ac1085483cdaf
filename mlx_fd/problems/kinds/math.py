r"""Formulas, sets, tuples, intervals, values with units: compared by what they mean.

``\sqrt{12}`` is ``2\sqrt{3}`` and ``{1,2}`` is ``{2,1}``, but ``(1,2)`` is not ``(2,1)``.
math-verify (https://github.com/huggingface/Math-Verify) reads and compares, in a process of its
own with limits (:mod:`mlx_fd.problems.math_worker`): a model may write a tower of powers.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.parsing import after_mark, boxed, gold_part
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

_LONGEST = 300  # characters
_SPACE = re.compile(r"\\[,!;: ]|[ \t\n]|\\left(?![a-z])|\\right(?![a-z])")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")


def _available() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "these answers are formulas, which math-verify compares, and it is not installed: "
            'pip install "mlx-fd[math]", or choose problems with numbers'
        )


def written(text: str) -> str:
    """A formula without what changes its look alone."""
    text = text.strip().strip("$").removesuffix(".").strip("$")
    return _FRACTION.sub(r"\\frac", _SPACE.sub("", text))


def _read(text: str, problem: Problem, how: str) -> str | None:
    for piece in (after_mark(text), boxed(without_thoughts(text))):
        if piece is not None and len(piece) <= _LONGEST:
            inner = boxed(piece)
            return written(piece if inner is None else inner) or None
    return None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    gold = written(gold_part(str(answer)))
    if not gold:
        raise ValueError("'answer' is empty")
    return gold


def _alike(one: str, other: str) -> bool:
    if one == other:
        return True
    from mlx_fd.problems.math_worker import same

    return same(one, other)


def _same(final: str, problem: Problem) -> bool:
    golds = (problem.answer, *problem.also_right)
    return final in golds or any(_alike(gold, final) for gold in golds)


register_kind(
    AnswerKind(
        name="math",
        help="a formula, a set, a tuple or an interval, compared by math-verify",
        order=20,
        form=Form(end="End with a line of its own: #### <answer>"),
        read=_read,
        same=_same,
        gold=_gold,
        available=_available,
        alike=_alike,
    )
)
