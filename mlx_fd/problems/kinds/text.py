"""A name or a few words, compared as SQuAD compares them: letters' case, articles and marks aside.

The normalisation is that of Rajpurkar et al. (arXiv 1606.05250), in every script. What makes a
number another one (signs, decimal marks, colons, slashes) is kept where answers are compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.parsing import final_text, gold_part, without_lead
from mlx_fd.problems.prompts import Form

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_TEX = re.compile(r"\\(?:boxed|fbox|mbox|emph|(?:text|math)(?:bf|it|rm|sf|tt)?)\{([^{}]*+)\}")
_MAX_NESTED = 3  # a bold text in a box
_IN_DOLLARS = re.compile(r"\s*+\$([^$]++)\$\s*+")
_ARTICLES = frozenset({"a", "an", "the"})
_GROUPS = re.compile(
    r"""(?<![\d.,])(?:\d{1,3}(?:\.\d{3})++(?=,\d{1,2}(?!\d))   # 1.234,50
      |[1-9]\d{0,2}(?:\.\d{3}){2,}+(?![.,]?\d)
      |[1-9]\d{0,2}(?:,\d{3})++(?!,?\d)
      |\d{1,2}(?:,\d{2}(?!\d))++,\d{3}(?!,?\d))""",
    re.VERBOSE,
)
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_NO_WHOLE = re.compile(r"(?<![^\s(\[$-])\.(?=\d)")  # .5
# Marks that are no punctuation: of numbers, C#, and grades.
_KEPT = re.compile(
    r"""(?<=\d)[.:/-](?=\d)|(?<![^\s(\[$"'*])-(?=[$]?\d)
    |(?<=\w)\#{1,2}(?![\w\#])|(?<=(?<!\S)[a-f])-(?!\S)""",
    re.VERBOSE,
)
_TWINS = str.maketrans({**dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"), "\u2044": "/"})
MAX_TEXT = 300
"""Characters of an answer; a reply that runs on is none."""


def normal(text: str) -> str:
    """A text without case, punctuation, articles and superfluous spaces.

    A text of articles alone keeps them: ``A`` may be a vitamin, or a choice.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join("" if unicodedata.category(char)[0] == "P" else char for char in text)
    return " ".join((_ARTICLE.sub(" ", kept).split()) or kept.split())


def compared(text: str) -> str:
    """A text as answers are compared: :func:`normal`, but 12.5 is not 125, and C# is not C.

    Between digits ``.``, ``:``, ``/`` and ``-`` stay, and a comma is a decimal one unless it parts
    thousands; a sign before a number stays, and ``#`` at the end of a word.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_TWINS)
    text = _GROUPS.sub(lambda match: match[0].replace(",", "").replace(".", ""), text)
    text = _NO_WHOLE.sub("0.", _COMMA.sub(".", text))
    places = {place for match in _KEPT.finditer(text) for place in range(*match.span())}
    words = "".join(
        char
        for place, char in enumerate(text)
        if place in places or unicodedata.category(char)[0] != "P"
    ).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def without_tex(text: str) -> str:
    r"""A text without the LaTeX around its words: ``$\boxed{\text{blue}}$`` is ``blue``."""
    for _ in range(_MAX_NESTED):
        text = _TEX.sub(r"\1", text)
    formula = _IN_DOLLARS.fullmatch(text)
    return formula[1] if formula else text


def words_of(text: str) -> str:
    """A text as :func:`compared` has it, without the LaTeX around its words."""
    return compared(without_tex(text))


def token_f1(final: str, gold: str) -> float:
    """F1 of the words that two normalised texts share (SQuAD), in [0, 1]."""
    one, other = normal(final).split(), normal(gold).split()
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def _read(text: str, problem: Problem, how: str) -> str | None:
    final = final_text(text)
    if final is None or len(final) > MAX_TEXT:
        return None
    return compared(without_lead(without_tex(final).strip(" *`$<>"))) or None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    text = {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)
    final = without_tex(gold_part(text))
    if "####" in text and "\n" in final:
        raise ValueError(
            "the last '####' of 'answer' has words behind it and more below, as a heading has; "
            "end it with #### <answer>"
        )
    if not compared(final):
        raise ValueError("'answer' has no word in it")
    return final.strip()


def _same(final: str, problem: Problem) -> bool:
    return final in {compared(gold) for gold in (problem.answer, *problem.also_right)}


register_kind(
    AnswerKind(
        name="text",
        help="a name or a few words, compared without case, articles and punctuation",
        order=40,
        form=Form(end="End with a line of its own: #### <answer>"),
        read=_read,
        same=_same,
        gold=_gold,
        exclusive=False,
    )
)
