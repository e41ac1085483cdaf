r"""Formulas, sets, tuples, intervals, values with units: compared by what they mean.

``\sqrt{12}`` is ``2\sqrt{3}`` and ``{1,2}`` is ``{2,1}``, but ``(1,2)`` is not ``(2,1)``.
math-verify (https://github.com/huggingface/Math-Verify) reads and compares, in a process of its
own with limits (:mod:`mlx_fd.problems.math_worker`): a model may write a tower of powers.
"""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.parsing import after_mark, boxed, gold_part
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

_LONGEST = 300  # characters
# A gold answer is shorter than a solution: so many words, and fewer where there are two sentences.
_MOST_WORDS, _MOST_WITH_SENTENCES = 12, 6
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}+")
_NEXT_SENTENCE = re.compile(r"[a-z0-9)}$][.!?]\s++[A-Z]")
_SPACE = re.compile(r"\\[,!;: ]|[ \t\n]|\\left(?![a-z])|\\right(?![a-z])")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_EXPONENT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]++")
_DIGITS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789"
)
# What is written without LaTeX, as LaTeX has it.
_AS_LATEX = (
    (re.compile(r"\u221a[ ]?(?:\(([^()]*+)\)|(\d++|[A-Za-z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<=[\w)}])\*\*(?=[\w({-])"), "^"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])|\u03c0"), r"\\pi"),
    (re.compile(r"\u00b0"), r"^{\\circ}"),
    (re.compile(r"\u221e"), r"\\infty"),
    (re.compile(r"\u222a"), r"\\cup"),
    (re.compile(r"\u2212"), "-"),
    (re.compile(r"(?:\\varnothing(?![A-Za-z])|\u2205)"), r"\\emptyset"),
)
_BASE = re.compile(r"(\d++)_(?:\{(\d{1,2})\}|(\d))")
_REPEATING = re.compile(r"(\d{1,9}+)\.(\d{0,9}+)\\overline\{(\d{1,9})\}")
_UNIT = re.compile(r"(?<=[\d}])\\?(?:(?:text|mathrm|mbox)\{([A-Za-z]++)\.?\}|([A-Za-z]++)\.?)\Z")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "mi mile miles",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "s sec second seconds",
        "min minute minutes",
        "h hr hour hours",
        "day days",
    )
    for name in names.split()
}


def _available() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "these answers are formulas, which math-verify compares, and it is not installed: "
            'pip install "mlx-fd[math]", or choose problems with numbers'
        )


def written(text: str) -> str:
    """A formula without what changes its look alone."""
    text = text.strip().strip("$").removesuffix(".").strip("$")
    text = _EXPONENT.sub(lambda match: f"^{{{match[0].translate(_DIGITS)}}}", text)
    for pattern, latex in _AS_LATEX:
        text = pattern.sub(latex, text)
    return _FRACTION.sub(r"\\frac", _SPACE.sub("", text))


def _read(text: str, problem: Problem, how: str) -> str | None:
    for piece in (after_mark(text), boxed(without_thoughts(text))):
        if piece is not None and len(piece) <= _LONGEST:
            inner = boxed(piece)
            return written(piece if inner is None else inner) or None
    return None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    part = gold_part(str(answer))
    most = _MOST_WITH_SENTENCES if _NEXT_SENTENCE.search(part) else _MOST_WORDS
    if len(_WORD.findall(part)) > most:
        raise ValueError(
            "its solution does not say what it comes to; end it with #### <answer> or "
            r"\boxed{<answer>}, or give the answer in a column of its own"
        )
    gold = written(part)
    if not gold:
        raise ValueError("'answer' is empty")
    return gold


def _unit(text: str) -> str | None:
    found = _UNIT.search(text[-40:])
    return _UNITS.get((found[1] or found[2]).lower()) if found else None


def _in_base(text: str) -> tuple[str, str] | None:
    """The digits and the base of ``101_2``; ``None`` where that is ten."""
    found = _BASE.fullmatch(text)
    base = found and (found[2] or found[3])
    return (found[1], base) if found and base and base != "10" else None


def _repeating(match: re.Match[str]) -> str:
    """A decimal that repeats, as a LaTeX fraction."""
    whole, begin, period = match.groups()
    value = Fraction(f"{whole}.{begin}0")
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(begin))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _alike(one: str, other: str) -> bool:
    if one == other:
        return True
    from mlx_fd.problems.math_worker import same

    # math-verify reads over both.
    if _in_base(one) != _in_base(other):
        return False
    if len({_unit(one), _unit(other)} - {None}) > 1:
        return False
    return same(_REPEATING.sub(_repeating, one), _REPEATING.sub(_repeating, other))


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
