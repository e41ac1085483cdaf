"""A name or a few words, compared as SQuAD compares them: letters' case, articles and marks aside.

The normalisation is that of Rajpurkar et al. (arXiv 1606.05250), in every script.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.parsing import after_mark, boxed
from mlx_fd.problems.prompts import Form
from mlx_fd.problems.thoughts import without_thoughts

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_TEX = re.compile(r"\\(?:boxed|fbox|(?:text|math)(?:bf|rm)?)\{([^{}]*+)\}")
_LEAD = re.compile(r"\A(?:the )?(?:final )?answer(?: is\b|:)[ *]*+", re.IGNORECASE)
MAX_TEXT = 300
"""Characters of an answer; a reply that runs on is none."""


def normal(text: str) -> str:
    """A text without case, punctuation, articles and superfluous spaces.

    A text of articles alone keeps them: ``A`` may be a vitamin, or a choice.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join("" if unicodedata.category(char)[0] == "P" else char for char in text)
    return " ".join((_ARTICLE.sub(" ", kept).split()) or kept.split())


def token_f1(final: str, gold: str) -> float:
    """F1 of the words that two normalised texts share (SQuAD), in [0, 1]."""
    one, other = normal(final).split(), normal(gold).split()
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))


def _read(text: str, problem: Problem, how: str) -> str | None:
    for piece in (after_mark(text), boxed(without_thoughts(text))):
        if piece is not None and len(piece) <= MAX_TEXT:
            return normal(_LEAD.sub("", _TEX.sub(r"\1", piece).strip(" *$<>"))) or None
    return None


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    text = {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)
    final = after_mark(text) if "####" in text else text
    if final is None or not normal(final):
        raise ValueError("'answer' has no word in it")
    return final.strip()


def _same(final: str, problem: Problem) -> bool:
    return final in {normal(gold) for gold in (problem.answer, *problem.also_right)}


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
