"""Where a text has its final answer: behind a mark, in a box, in tags, on its last line."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator

from mlx_fd.problems.parsing.characters import PLAIN, last_match
from mlx_fd.problems.thoughts import without_thoughts

BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{?)")
_MARK = re.compile("#{4,}")
# As DeepSeek-R1-Zero is asked to answer.
TAGGED = re.compile(r"<answer>((?:[^<]++|<(?!/?answer>))*+)</answer>", re.IGNORECASE)
_ANSWER = r"[\s*_`>]*+(?:the\s++)?+(?:final\s++|correct\s++)?+answer[*_]*+"
# What says that an answer follows, with a colon or without one.
_LEADS_TO = re.compile(
    rf"{_ANSWER}(?:\s*+(?:is\s*+)?+(?P<colon>[:=\uff1a])|\s++is\b)[\s*_`]*+", re.IGNORECASE
)
_IS_HEADING_OF = re.compile(rf"{_ANSWER}(?:\s++is)?+[\s*_`:\uff1a]*+", re.IGNORECASE)
_WORD = re.compile(r"\w")
# Where a reply has answered, and goes on with a problem of its own.
_NEXT_PROBLEM = re.compile(
    r"\n[ \t*_#>]{0,9}(?:Question|Problem|Q)[ ]?\d{0,4}[*_]{0,3}:", re.IGNORECASE
)
_MAX_PROBLEMS = 3  # that are looked for behind an answer, the first ones
_MAX_MARKS = 10_000  # that are tried, the last ones: no solution has as many


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``; the rest of the text where it is never closed."""
    box = last_match(BOX, text)
    if box is None:
        return None
    window = text[box.end() : box.end() + 300]
    if not box[1]:
        return window
    depth = 1
    for place, char in enumerate(window):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if not depth:
            return window[:place]
    return window


def mark_ends(text: str) -> Iterator[int]:
    """Where the marks of a final answer (``####``) end, the last first."""
    marks = text.translate(PLAIN) if "\uff03" in text else text
    for mark in reversed(deque(_MARK.finditer(marks), maxlen=_MAX_MARKS)):
        yield mark.end()


def until_next_problem(text: str, has_answer: Callable[[str], bool]) -> str:
    """A reply up to where it goes on with another problem after it has answered its own."""
    for found in itertools.islice(_NEXT_PROBLEM.finditer(text), _MAX_PROBLEMS):
        if has_answer(before := text[: found.start()]):
            return before
    return text


def untagged(text: str) -> str:
    """What stands in a text's last ``<answer>`` tags, if it marks no answer behind them."""
    tagged = last_match(TAGGED, text)
    if tagged is None or not _WORD.search(tagged[1]):
        return text
    behind = text[tagged.end() :]
    return text if _MARK.search(behind) or BOX.search(behind) else tagged[1]


def has_text(text: str) -> bool:
    """Whether a text marks an answer in some way."""
    return any(mark_ends(text)) or bool(BOX.search(text) or TAGGED.search(text))


def first_line(text: str) -> tuple[str, str]:
    """The first line of a text that says something, and what is below it."""
    line, _, below = text.strip().partition("\n")
    return line.strip(), below.strip()


def below_heading(line: str, below: str) -> tuple[str, str]:
    """A line and what is below it, but for a line that says no more than ``Final answer:``."""
    return first_line(below) if _IS_HEADING_OF.fullmatch(line) else (line, below)


def _last_marked(text: str) -> tuple[str, str]:
    """The line of the last ``####`` that anything follows on it, and what is below."""
    for end in mark_ends(text):
        stop = text.find("\n", end)
        stop = len(text) if stop < 0 else stop
        if line := text[end:stop].strip():
            return line, text[stop:].strip()
    return "", text


def marked(text: str) -> tuple[str, str]:
    """The answer that the last ``####`` marks, and what is below it; empty, and all: none does.

    It stands on the mark's line, or below ``#### Final answer`` on the next.
    """
    line, below = _last_marked(text)
    return below_heading(line, below) if below else (line, below)


def without_lead(text: str) -> str:
    """A text without the words that say that it is an answer: ``**Answer:** 18`` is ``18``."""
    lead = _LEADS_TO.match(text)
    return text[lead.end() :] if lead else text


def on_last_line(text: str, *, colon: bool = False) -> str:
    """What the last line of a text says that the answer is; empty: it says nothing of that."""
    line = text.rstrip().rpartition("\n")[2]
    lead = _LEADS_TO.match(line)
    return "" if lead is None or (colon and not lead["colon"]) else line[lead.end() :].strip(" *_`")


def final_text(text: str) -> str | None:
    r"""What a reply says that its answer is, whatever that is; ``None``: it does not say so.

    It is in ``<answer>`` tags, in a ``\boxed{}`` behind the last ``####``, behind ``Answer:`` on
    the last line below that mark, or on its line; without a mark it is in the last box, or on the
    last line behind ``Answer:`` or ``The answer is``.
    """
    whole = until_next_problem(without_thoughts(text), has_text)
    text = untagged(whole)
    line, below = marked(text)
    box = boxed(f"{line}\n{below}")
    if box is None and line:
        return on_last_line(below, colon=True) or line
    if box is not None:
        return box
    return on_last_line(text) or (text.strip() if text != whole else None)


def after_mark(text: str) -> str | None:
    """What follows on its line the last ``####`` that anything follows; ``None``: none does."""
    text = until_next_problem(without_thoughts(text), lambda before: any(mark_ends(before)))
    return _last_marked(text)[0] or None
