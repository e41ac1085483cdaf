"""Final answers: the number, or the text behind a mark, that a solution comes to."""

from __future__ import annotations

import re
from fractions import Fraction

from mlx_fd.problems.parsing.characters import last_match
from mlx_fd.problems.parsing.lm_eval import FULL_STOP, lm_eval_answer
from mlx_fd.problems.parsing.marks import (
    BOX,
    TAGGED,
    below_heading,
    boxed,
    first_line,
    has_text,
    mark_ends,
    on_last_line,
    untagged,
    until_next_problem,
)
from mlx_fd.problems.parsing.numbers import (
    LONGEST_NUMBER,
    NUMBER,
    SPACED,
    Leading,
    boxed_number,
    is_number,
    leading_number,
    plain_number,
    spaced_value,
    value_in_text,
)
from mlx_fd.problems.thoughts import without_thoughts

_PLAIN_DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# A word that is no command of LaTeX: what begins with one may be a heading.
_WORD_OF_TWO = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2}")
_NOTE = re.compile(
    r"\n[ \t*_(>]{0,9}(?:Notes?|N\.?B\.?|Remarks?|P\.?S\.?)[*_]{0,3}:", re.IGNORECASE
)


def gold_part(answer: str) -> str:
    r"""The final answer in a gold solution; all of it where nothing says which part that is.

    It is in ``<answer>`` tags, in a box behind the last ``####``, or behind that mark; without a
    mark in the last box, or behind ``Answer:`` or ``The answer is`` on the last line. A mark with
    words on its line and more below is a heading, and none of an answer. What a solution only
    thinks is none either, so of one that ends within a thought nothing is left.
    """
    answer = untagged(without_thoughts(answer))
    _, mark, behind = answer.rpartition("####")
    line, below = below_heading(*first_line(behind))
    is_heading = below and _WORD_OF_TWO.search(line) and not is_number(line)
    if mark and not is_heading and boxed(behind) is None:
        return line
    if (box := boxed(answer)) is not None:
        return " ".join(box.split())
    return on_last_line(answer) or (behind if mark else answer).strip()


def final_answer(text: str, how: str = "auto") -> Fraction | None:
    r"""The number a solution arrives at.

    ``"auto"`` takes the number after the last ``####`` that has one, or the one in a ``\boxed{}``
    behind it or behind ``Answer:`` on the last line; else the one in the last ``\boxed{}``; else
    the last number of the text, notes below it aside. Where ``<answer>`` tags stand behind all of
    these, it looks between them alone. A reply that goes on with the next question has answered
    before it. It reads thousands separators (dots from two groups on; a plain space in ``12 500``
    only where nothing but a unit follows; in a sentence, a unit and no noun, or it has no number),
    currency signs, decimals (a decimal comma only where it can be nothing else), fractions, mixed
    numbers, scientific notation, LaTeX and the digits of every script; units are ignored. As in
    GSM8K, ``50%`` is 50. ``5 thousand`` is 5000; ``5 Mio.`` and ``5 lakh`` are not read. No number
    is taken out of a formula (``\sqrt{51}``, ``2^k`` or ``(2,4)``): a reply that comes to one has
    none, nor has one whose answer has two numbers (``3:30``, ``2 hours and 30 minutes``).
    ``"strict"`` and ``"flexible"`` read what :func:`lm_eval_answer` extracts.

    Args:
        text: the solution.
        how: ``"auto"``, ``"strict"`` or ``"flexible"``.

    Returns:
        The exact value; ``None`` where there is no number or one of more than 60 characters.
    """
    text = without_thoughts(text)
    if how != "auto":
        found = lm_eval_answer(text, how).replace(",", "").replace("$", "")
        found = FULL_STOP.sub("", found)
        readable = len(found) <= LONGEST_NUMBER and _PLAIN_DECIMAL.fullmatch(found)
        return Fraction(found) if readable else None
    text = untagged(until_next_problem(text, _has_number))
    behind, at = _marked_number(text)
    # A heading may look like an answer ("#### 2. Money"); what is boxed below it is one, and what
    # the last line says that the answer is.
    if behind is not None and not BOX.search(text, at):
        said = leading_number(on_last_line(text[at:], colon=True)[:120])
        return said.value if said.value is not None or said.is_formula else behind.value
    if (box := boxed(text)) is not None:
        in_box = boxed_number(box)
        if in_box.value is not None or in_box.is_formula:
            return in_box.value
    if behind is not None:
        return behind.value
    note = _NOTE.search(text)
    for part in (text[: note.start()] if note else "", text):
        plain = plain_number(part)
        if last := last_match(NUMBER, plain):
            spaced = last_match(SPACED, plain)
            if spaced and spaced.start() <= last.start() < spaced.end():
                return spaced_value(plain, spaced, last)
            return value_in_text(plain, last)
    return None


def _marked_number(text: str) -> tuple[Leading | None, int]:
    """What is behind the last ``####`` with a number or a formula, and where that mark ends."""
    for end in mark_ends(text):
        found = leading_number(text[end : end + 120])
        if found.value is not None or found.is_formula:
            return found, end
    return None, 0


def _has_number(text: str) -> bool:
    found = BOX.search(text) or TAGGED.search(text)
    return found is not None or _marked_number(text)[0] is not None


def final_part(text: str) -> str:
    """The part of a reply that has its final answer: no thought, and no next problem."""
    return untagged(until_next_problem(without_thoughts(text), has_text))
