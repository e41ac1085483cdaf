"""Noise on a question: as it is typed in a hurry, or transcribed from speech.

EchoDistill (arXiv 2605.23954) learns from clean input how to read noisy input; this is its noise,
on text. The level is the share of words that are hit. Up to :data:`NUMBERS_SAFE` every number can
be recovered from what is there; above it digits are hit too, and some cannot.
"""

from __future__ import annotations

import hashlib
import random
import re

KINDS = ("typed", "transcribed")
NUMBERS_SAFE = 0.5
_LONGEST = 4096  # characters of a question that a draw is made from

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_HOMOPHONES = {
    "has": "as", "buys": "byes", "more": "moor", "to": "too", "now": "nough", "loses": "looses",
    "sells": "cells", "finds": "fines", "gives": "gibs", "each": "eech", "with": "whiff",
    "bags": "backs", "boxes": "boxers", "books": "box", "coins": "queens", "cards": "cars",
    "pens": "pence", "shells": "shelves", "stamps": "stems", "eggs": "x", "apples": "apple's",
    "number": "numb her", "of": "off", "the": "thee", "have": "halve", "are": "our", "is": "ease",
    "left": "lift", "years": "ears", "old": "hold", "starts": "stars", "many": "meny",
    "their": "there", "there": "their", "hour": "our", "week": "weak", "pair": "pear",
    "piece": "peace", "whole": "hole", "weighs": "ways",
}  # fmt: skip
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# What is told apart by one sound: the numbers that a listener mixes up.
_SOUNDS_LIKE = {13: 30, 14: 40, 15: 50, 16: 60, 17: 70, 18: 80, 19: 90}
_SOUNDS_LIKE |= {tens: teens for teens, tens in _SOUNDS_LIKE.items()}
_TOKEN = re.compile(r"\d+|[^\W\d]+(?:'[^\W\d]+)*")


def spoken(number: int) -> str:
    """A number below 100 in words, its parts apart; a larger one digit by digit."""
    if number < len(_ONES):
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")
    return " ".join(_ONES[int(digit)] for digit in str(number))


def _slip(rng: random.Random, word: str) -> str:
    """A word as a hurried finger types it: a key beside, two keys swapped, one lost or doubled."""
    index = rng.randrange(len(word))
    how = rng.choice(("beside", "swapped", "lost", "doubled"))
    if how == "swapped" and len(word) > 1:
        index = min(index, len(word) - 2)
        return word[:index] + word[index + 1] + word[index] + word[index + 2 :]
    if how == "lost" and len(word) > 2:
        return word[:index] + word[index + 1 :]
    row = next((row for row in _ROWS if word[index].lower() in row), "")
    if how == "beside" and row:
        at = row.index(word[index].lower())
        near = row[at - 1] if at and (at == len(row) - 1 or rng.random() < 0.5) else row[at + 1]
        return word[:index] + (near.upper() if word[index].isupper() else near) + word[index + 1 :]
    return word[:index] + word[index] + word[index:]


def _struck(rng: random.Random, digits: str) -> str:
    """Digits with one replaced by the key beside it: what they were is lost."""
    index = rng.randrange(len(digits))
    digit = int(digits[index])
    near = rng.choice([d for d in (digit - 1, digit + 1) if 0 <= d <= 9])
    return f"{digits[:index]}{near}{digits[index + 1 :]}"


def _heard(rng: random.Random, word: str, *, safe: bool) -> str:
    """A word as a transcriber hears it."""
    if word.isdigit():
        number = int(word)
        return spoken(number if safe else _SOUNDS_LIKE.get(number, number))
    heard = _HOMOPHONES.get(word.lower(), word)
    return heard.capitalize() if word[0].isupper() else heard


def noisy(question: str, kind: str, level: float, seed: int) -> str:
    """A question with noise on it.

    Which words are hit is drawn by seed and question; a word that is hit at one level is hit at
    every higher one.

    Args:
        question: the clean question.
        kind: ``"typed"``: keyboard slips in words; above :data:`NUMBERS_SAFE` a digit of a hit
            number becomes the one beside it. ``"transcribed"``: words become others that sound
            alike, numbers their words (``23``: ``twenty three``); above :data:`NUMBERS_SAFE`
            fifteen is heard as fifty, and the like. Words without such a twin stay.
        level: the share of words that are hit, 0 to 1.
        seed: with the question, it fixes every slip.

    Raises:
        ValueError: there is no such kind, or the level is not in [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"noise must be one of {', '.join(KINDS)}, not {kind!r}")
    if not 0 <= level <= 1:
        raise ValueError(f"a noise level must be between 0 and 1, not {level}")
    safe = level <= NUMBERS_SAFE
    # Each word's draw reads all of this.
    drawn_from = question
    if len(question) > _LONGEST:
        drawn_from = hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest()

    def hit(match: re.Match[str]) -> str:
        word = match[0]
        rng = random.Random(f"noise/{seed}/{kind}/{drawn_from}/{match.start()}")
        if rng.random() >= level:
            return word
        if kind == "transcribed":
            return _heard(rng, word, safe=safe)
        if word.isdigit():
            return word if safe else _struck(rng, word)
        return _slip(rng, word)

    return _TOKEN.sub(hit, question)
