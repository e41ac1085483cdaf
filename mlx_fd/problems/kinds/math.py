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
from mlx_fd.problems.parsing import final_text, gold_part, is_number, number, without_lead
from mlx_fd.problems.parsing.characters import PLAIN
from mlx_fd.problems.prompts import Form

_LONGEST = 300  # characters
# A gold answer is shorter than a solution: so many words, and fewer where there are two sentences.
_MOST_WORDS, _MOST_WITH_SENTENCES = 12, 6
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}+")
_NEXT_SENTENCE = re.compile(r"[a-z0-9)}$][.!?]\s++[A-Z]")
# Worked out in words, as in "She has 3 + 5 = 8 apples".
_WORKED_OUT = re.compile(r"\d\s?[-+*/\u00d7\u00f7]\s?\d[\d\s.,()$+*/\u00d7\u00f7-]{0,40}+=")
_LONG_WORD = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{3,}+")
_MOST_AROUND = 4  # layers of Markdown and words
_AHEAD = re.compile(r"(?:=>|[ =:\u2192\u21d2])++")
_EMPHASIZED = re.compile(r"\A(\*{1,3}+)([^*]++)\*{1,3}(?![\w({-])")
_PAIRS = (("\\[", "\\]"), ("\\(", "\\)"), ('"', '"'), ("_", "_"), ("<", ">"))
_IN_ANGLES = re.compile(r"[,<>]")
_DOLLAR = re.compile(r"\\?\$")
# A row of a matrix ends in two backslashes, and the second one is not that of a space.
_ROW_OR_SPACE = re.compile(r"(\\\\)|\\[,!]|\\[;:]|\\?\s|~")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_SIDE = re.compile(r"\\(?:left|right)(?![a-z])")
# One number without a unit: no list of two, no percentage.
_NUMERAL = re.compile(
    r"""(?!-?0,)[-+]?(?:[\d.'\u202f /\u00bc-\u00be\u2150-\u215e{}]|,(?=\d{3}(?!\d))|\\[dtc]?frac
    |(?<=\d)[eE](?=[-+]?\d)[-+]?|[ ]?(?:\\times|\u00d7|\*)[ ]?10[ ]?\^[ ]?\{?[-+]?)++""",
    re.VERBOSE,
)
_SIMPLE = re.compile(r"-?(?:\d++(?:\.\d++|/\d++)?|\\frac\{\d++\}\{\d++\})")
_COUNTED = re.compile(r"([-+]?\d[\d.,/]*+)\s++([A-Za-z]{4}[A-Za-z .]*+|[A-Za-z]{1,3})")
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
        "week weeks",
        "month months",
        "year years",
        "cent cents",
        "dollar dollars",
    )
    for name in names.split()
}


def _available() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "these answers are formulas, which math-verify compares, and it is not installed: "
            'pip install "mlx-fd[math]", or choose problems with numbers'
        )


def _bare(text: str) -> str:
    """An answer without the Markdown, the words and the delimiters around it."""
    text = _DOLLAR.sub("", text)
    for _ in range(_MOST_AROUND):
        before = text
        text = _EMPHASIZED.sub(r"\2", without_lead(text.strip("` ")))
        # One star at the end may be a conjugate's.
        if text.startswith("*") or text.endswith("**"):
            text = text.strip("*")
        if ahead := _AHEAD.match(text):
            text = text[ahead.end() :]
        if text.endswith((".", "\u3002", "\uff61")) and not text.endswith(".."):
            text = text[:-1]
        for begin, end in _PAIRS:
            inner = text[len(begin) : -len(end)]
            # <1,2> is a vector, and <b>5</b> has more than these two.
            if text == begin + inner + end and (begin != "<" or not _IN_ANGLES.search(inner)):
                text = inner
        if text == before:
            break
    return text.strip()


def _value(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else; ``12,5`` may be two."""
    return number(text) if _NUMERAL.fullmatch(text) and is_number(text) else None


def written(text: str) -> str:
    """A formula without what changes its look alone, and a number in its plain form."""
    text = _ROW_OR_SPACE.sub(_row_or_space, _SIDE.sub("", text.translate(PLAIN)))
    text = _bare(" ".join(text.split()))
    value = _value(text)
    if value is not None:
        text = _FRACTION.sub(r"\\frac", text)
        return text if _SIMPLE.fullmatch(text) else str(value)
    counted = _COUNTED.fullmatch(text)
    if counted and is_number(text) and (len(counted[2]) > 3 or counted[2].lower() in _UNITS):
        text = rf"{counted[1]}\text{{{counted[2]}}}"
    text = _EXPONENT.sub(lambda match: f"^{{{match[0].translate(_DIGITS)}}}", text)
    for pattern, latex in _AS_LATEX:
        text = pattern.sub(latex, text)
    return _FRACTION.sub(r"\\frac", _SPACE.sub("", text))


def _row_or_space(match: re.Match[str]) -> str:
    """The end of a row as it is, a thin space as nothing, any other as one."""
    return match[1] or ("" if match[0] in ("\\,", "\\!") else " ")


def _read(text: str, problem: Problem, how: str) -> str | None:
    final = final_text(text)
    if final is None or len(final) > _LONGEST:
        return None
    return written(final) or None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    part = gold_part(str(answer))
    most = _MOST_WITH_SENTENCES if _NEXT_SENTENCE.search(part) else _MOST_WORDS
    worked = _WORKED_OUT.search(part) and _LONG_WORD.search(part)
    lines = "\n" in part and "\\begin{" not in part
    if worked or lines or len(_WORD.findall(part)) > most:
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
    values = _value(one), _value(other)
    if None not in values:
        # math-verify calls numbers the same that differ in the seventh place.
        return values[0] == values[1]
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
