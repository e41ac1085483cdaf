"""One of several choices, which the question lists by letter."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.kinds.text import compared, without_tex, words_of
from mlx_fd.problems.parsing import boxed, final_part, gold_part, marked
from mlx_fd.problems.prompts import Form

LETTERS = string.ascii_uppercase
# All of a text: "B", "(b)", "**B**", "'B'.".
_BARE = re.compile(r"[\s*_`\"'(\[{<$]*+([A-Za-z])[\s*_`\"')\]}>$.:]*+\Z")
# A letter and what follows it: "B.", "B) the second", "Answer: B", "option B".
_LETTER = re.compile(
    r"[\s*_`\"'(\[{<$\\]*+(?:(?:the|correct|final|right|answer|option|choice|is)\b[\s:*_`(]*+){0,6}"
    r"(?:(?:text|math)(?:bf|rm)?\{\(?)?([A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
# "(A) and (B)" is no choice of one.
_ANOTHER = re.compile(
    r"[\s)\].:*_`]*+(?:and\b|or\b|[,&/])\s*+[(\[*_`]*+([A-Z])(?![A-Za-z0-9'])", re.IGNORECASE
)
_WORD = (
    r"(?:\b(?i:answer|choice|option|antwort|lösung|réponse|respuesta|risposta|resposta)\b"
    r"|答案|答え|정답)"
)
_IS = r"(?:\s++(?i:is|ist|est|es|è|é)\b|\s*+(?:[:是は은]|为))"
_BEGIN, _END = r"[\s:*_`\"'(\[$]{0,12}+", r"([A-Z])(?![A-Za-z0-9]|'[a-z])"
_SAID = re.compile(rf"{_WORD}{_IS}{_BEGIN}{_END}")
# "The answer is blue.": the words of a choice.
_SAID_WORDS = re.compile(rf"{_WORD}{_IS}{_BEGIN}([^\n]{{1,300}})")
_SAID_AFTER = re.compile(
    rf"(?<![A-Za-z0-9]){_END}[)\]*_`\"']{{0,4}}+\s++(?:is|was)\s++(?:(?:the|correct|right|best)\s++)"
    r"{0,3}(?:answer|choice|option|one)\b"
)
_SENTENCE_END = re.compile(r"[.;!?](?:\s|\Z)")
# One that is spoken of, be it right or wrong.
_NAMED_LETTER = re.compile(rf"{_WORD}{_BEGIN}{_END}")


def listed(question: str, choices: Sequence[str]) -> str:
    """A question with its choices below it, each with its letter."""
    lines = [
        f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    return "\n".join([question.strip(), *lines])


def choices_in(question: str) -> tuple[str, ...]:
    """The choices that :func:`listed` put below a question; empty where there are none."""
    found: list[str] = []
    for line in question.splitlines():
        if len(found) < len(LETTERS) and line.startswith(f"{LETTERS[len(found)]}. "):
            found.append(line[3:].strip())
    return tuple(found)


def letter_of(text: str, choices: Sequence[str]) -> str | None:
    """Which of the choices a short text means, by its letter or in its words.

    A letter by itself is the letter, even where another choice consists of it: of the vitamins
    "A. C" and "B. A", ``A`` means the first.
    """
    valid = LETTERS[: len(choices)]
    text = unicodedata.normalize("NFKC", without_tex(text))
    if (bare := _BARE.match(text)) and bare[1].upper() in valid:
        return bare[1].upper()
    match = _LETTER.match(text)
    letter = None if match is None or match[1].upper() not in valid else match[1].upper()
    rest = "" if match is None else compared(text[match.end() :].strip(" $>})"))
    if letter is not None and rest and rest == words_of(choices[valid.index(letter)]):
        return letter
    same = _in_words(text, choices)
    if same is not None or match is None or letter is None:
        return same
    if (another := _ANOTHER.match(text, match.end())) and another[1].upper() in valid:
        return None
    # "A dog" begins with an article, "A. a dog" with a letter: what follows must be the choice.
    choice = words_of(choices[valid.index(letter)])
    fits = not rest or rest == choice or choice.startswith(rest) or rest.startswith(choice)
    return letter if fits or text[match.end() : match.end() + 1] in ".):*" else None


def _in_words(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice that has these words."""
    words = words_of(text)
    same = [
        letter
        for letter, choice in zip(LETTERS, choices, strict=False)
        if words_of(choice) == words
    ]
    return same[0] if len(same) == 1 else None


def _read(text: str, problem: Problem, how: str) -> str | None:
    text, choices = final_part(text), problem.choices
    line, below = marked(text)
    # "#### Option C" may be a heading, and what is said below it the answer.
    box, said = boxed(f"{line}\n{below}"), _said(unicodedata.normalize("NFKC", below), choices)
    if box is not None and (letter := letter_of(box, choices)):
        return letter
    if said:
        return said[-1]
    for piece in (line, boxed(text)):
        if piece and (letter := letter_of(piece, choices)):
            return letter
    text = unicodedata.normalize("NFKC", text)
    valid = LETTERS[: len(choices)]
    if said := _said(text, choices):
        return said[-1]
    named: set[str] = {letter for letter in _NAMED_LETTER.findall(text) if letter in valid}
    return named.pop() if len(named) == 1 else letter_of(text, choices)


def _said(text: str, choices: Sequence[str]) -> list[str]:
    """What a text says that the answer is, in the order in which it says so."""
    valid = LETTERS[: len(choices)]
    found = {
        match.end(): match[1]
        for pattern in (_SAID, _SAID_AFTER)
        for match in pattern.finditer(text)
        if match[1] in valid
    }
    for match in _SAID_WORDS.finditer(text):
        sentence = _SENTENCE_END.split(match[1], maxsplit=1)[0]
        bare = _BARE.match(sentence)
        if bare and bare[1].upper() in valid:
            continue
        # "The answer is A dog" may name the choice "A dog".
        if letter := _in_words(sentence, choices):
            begin = match.start(1) + 1
            found = {end: said for end, said in found.items() if end != begin} | {begin: letter}
    return [found[end] for end in sorted(found)]


def _gold(answer: Any, choices: tuple[str, ...]) -> str:
    """A choice's index from 0 where it is an integer, else its letter or text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        letter = LETTERS[answer] if 0 <= answer < len(choices) else None
    else:
        text = gold_part(str(answer))
        letter = letter_of(text, choices)
        if letter and (in_words := _in_words(text, choices)) not in (None, letter):
            raise ValueError(
                f"'answer' is the letter {letter} and the text of choice {in_words}; write its "
                "place from 0, or a column for each choice (option_a, option_b, ...)"
            )
    if letter is None:
        raise ValueError(
            f"'answer' is none of the {len(choices)} choices, by letter, text or, as an integer, "
            "by its place from 0"
        )
    return letter


register_kind(
    AnswerKind(
        name="choice",
        help="one of the choices that the question lists, by letter",
        order=30,
        form=Form(end="End with a line of its own: #### <letter>"),
        read=_read,
        same=lambda final, problem: final == problem.answer,
        gold=_gold,
    )
)
