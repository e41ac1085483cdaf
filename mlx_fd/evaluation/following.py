"""Has a student forgotten what it was not trained on? Instructions that a program can check.

Each instruction asks for a form (so many words, no comma, JSON with these keys), and a function
says whether a reply has it, as in IFEval (Zhou et al., arXiv 2311.07911); these here are our own.
The student as trained stands beside what it was before its run, on the same instructions, greedily.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.baselines import CLEAR, STUDENT, Trial
from mlx_fd.evaluation.bench import Bench, Uses
from mlx_fd.evaluation.measures import Measure
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.writing import Sampling
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

Check = Callable[[str], bool]
NAME = "instructions with a form"
_LABELS = {STUDENT: "Student", CLEAR: "Student before its run"}
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_WORD_PART = re.compile(r"[^\W_]+")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_NUMBERED = re.compile(r"^(\d+)\. \S", re.MULTILINE)
_BULLET = re.compile(r"^\* \S", re.MULTILINE)
_FENCE = re.compile(r"^```(?:json)?\n|\n```$")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        id: its name.
        prompt: what the model is asked.
        follows: whether a reply has the form that was asked for.
    """

    id: str
    prompt: str
    follows: Check


# ----------------------------------------------------------------------------------------- checks


def words(text: str) -> list[str]:
    """A text's words, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line.strip()]


def at_most(count: int) -> Check:
    """At least one word, at most so many."""
    return lambda text: 0 < len(words(text)) <= count


def at_least(count: int) -> Check:
    """So many words or more."""
    return lambda text: len(words(text)) >= count


def has_lines(count: int) -> Check:
    """Exactly so many lines that are not empty."""
    return lambda text: len(_lines(text)) == count


def _parts(text: str) -> list[str]:
    """A text's words, those of one with hyphens or apostrophes each by itself, as IFEval's."""
    return [part for word in words(text) for part in _WORD_PART.findall(word)]


def uses(word: str, count: int) -> Check:
    """A word so many times or more."""
    return lambda text: _parts(text).count(word) >= count


def avoids(*banned: str) -> Check:
    """Some words, and none of these."""
    return lambda text: bool(words(text)) and not set(banned) & set(_parts(text))


def begins(start: str) -> Check:
    """Begins with these words, and goes on."""

    def check(text: str) -> bool:
        rest = text.strip().removeprefix(start)
        return text.strip() != rest and bool(words(rest)) and not rest[0].isalnum()

    return check


def ends(end: str) -> Check:
    """Ends with exactly these words, after others."""
    return lambda text: text.strip().endswith(end) and len(text.strip()) > len(end)


def has_keys(*keys: str) -> Check:
    """One JSON object with these keys and no others; a code fence around it is no harm."""

    def check(text: str) -> bool:
        try:
            value = json.loads(_FENCE.sub("", text.strip()))
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(value) == set(keys)

    return check


def bullets(count: int) -> Check:
    """Exactly so many lines that begin with an asterisk."""
    return lambda text: len(_BULLET.findall(text)) == count


def numbered(count: int) -> Check:
    """Exactly so many lines that begin with a number and a point, from 1 on in order."""
    wanted = [str(number) for number in range(1, count + 1)]
    return lambda text: _NUMBERED.findall(text) == wanted


def placeholders(count: int) -> Check:
    """So many words in square brackets, or more."""
    return lambda text: len(_PLACEHOLDER.findall(text)) >= count


def one_of(*allowed: str) -> Check:
    """One of these replies, whole."""
    return lambda text: text.strip() in allowed


def no_comma(text: str) -> bool:
    """Some words, and no comma."""
    return bool(words(text)) and "," not in text


def lower_case(text: str) -> bool:
    """Letters, none of them a capital."""
    return text.islower()


def upper_case(text: str) -> bool:
    """Letters, all of them capitals."""
    return text.isupper()


def quoted(text: str) -> bool:
    """All of it between double quotation marks."""
    whole = text.strip()
    return len(whole) > 2 and whole[0] == whole[-1] == '"'


def titled(text: str) -> bool:
    """A title between double angle brackets, and a text."""
    return bool(_TITLE.search(text)) and bool(words(_TITLE.sub("", text)))


def parted(text: str) -> bool:
    """Two parts with a line of three asterisks between them."""
    parts = text.split("\n***\n")
    return len(parts) == 2 and all(words(part) for part in parts)


def postscript(text: str) -> bool:
    """A text, and a postscript after it."""
    before, found, after = text.partition("P.S.")
    return bool(found and words(before) and words(after))


def every(*checks: Check) -> Check:
    """All of these."""
    return lambda text: all(check(text) for check in checks)


# ------------------------------------------------------------------------------------------- items

INSTRUCTIONS: tuple[Instruction, ...] = tuple(
    Instruction(f"{place:02d}", prompt, check)
    for place, (prompt, check) in enumerate(
        (
            ("Describe a rainy street. Do not use any commas.", no_comma),
            ("Name three things one takes to the beach. Use no comma at all.", no_comma),
            ("Say what a bicycle is, all in lower case letters.", lower_case),
            ("Greet a new neighbour. Write no capital letter anywhere.", lower_case),
            ("WARN PEOPLE OF A WET FLOOR. USE CAPITAL LETTERS ONLY.", upper_case),
            ("Announce a sale of shoes, in capital letters only.", upper_case),
            ("What is a library for? Answer in at most 12 words.", at_most(12)),
            ("Explain why the sky is blue in no more than 20 words.", at_most(20)),
            ("Tell how one makes tea, in at least 60 words.", at_least(60)),
            (
                "Write a letter to a friend about a train journey, of 80 words or more.",
                at_least(80),
            ),
            ("Write a poem about the sea that has exactly four lines.", has_lines(4)),
            ("List colours, one on each line, exactly six lines and nothing else.", has_lines(6)),
            ("Write about winter and use the word snow at least three times.", uses("snow", 3)),
            ("Praise a dog. The word loyal must be there at least twice.", uses("loyal", 2)),
            (
                "Describe an apple without the words red, green and fruit.",
                avoids("red", "green", "fruit"),
            ),
            ("Explain what money is. Do not use the words coin or bank.", avoids("coin", "bank")),
            (
                'Write two sentences about the moon. Begin with the words "Every night".',
                begins("Every night"),
            ),
            (
                'Give advice to a tired person. The reply must begin with "First of all".',
                begins("First of all"),
            ),
            (
                "Thank somebody for a gift. End with exactly these words: With love, Ann",
                ends("With love, Ann"),
            ),
            (
                "Tell what you know of bees. The last words must be: That is all.",
                ends("That is all."),
            ),
            (
                'Describe a cat as a JSON object with exactly the keys "name" and "age", and '
                "write nothing else.",
                has_keys("name", "age"),
            ),
            (
                'Give a city as a JSON object with exactly the keys "city", "country" and '
                '"river". Write only the JSON.',
                has_keys("city", "country", "river"),
            ),
            (
                'Give exactly three reasons to read, each on a line that begins with "* ".',
                bullets(3),
            ),
            ('Name exactly five animals, each on a line that begins with "* ".', bullets(5)),
            ("List the steps of washing hands, numbered 1. to 4., one on each line.", numbered(4)),
            ("Write a shopping list of exactly three numbered lines: 1., 2. and 3.", numbered(3)),
            ("Put your whole reply between double quotation marks: what is a friend?", quoted),
            ('Say good night to a child. The reply begins and ends with the mark ".', quoted),
            ("Write a short story with a title between << and >>.", titled),
            (
                "Write an invitation to a party with at least three blanks in square brackets, "
                "such as [date].",
                placeholders(3),
            ),
            ("Compare cats and dogs in two parts, with a line *** between them.", parted),
            ("Write a note to a teacher, with a postscript that begins with P.S.", postscript),
            (
                "Is water wet? Answer with one word, Yes or No, and nothing else.",
                one_of("Yes", "No", "Yes.", "No."),
            ),
            (
                "Is 7 larger than 9? Reply with exactly one of: larger, smaller, equal.",
                one_of("larger", "smaller", "equal"),
            ),
            (
                "Describe bread in at most 15 words and without a comma.",
                every(at_most(15), no_comma),
            ),
            (
                "Write exactly two lines about trees, all in lower case.",
                every(has_lines(2), lower_case),
            ),
        )
    )
)


# --------------------------------------------------------------------------------------------- set


@dataclass(frozen=True)
class Following:
    """Instructions with a form, and who follows them.

    Attributes:
        systems: ``student``, and ``clear``: the same before its run.
        max_tokens: maximum tokens per reply.
        items: the instructions.
    """

    systems: tuple[str, ...]
    max_tokens: int
    items: Sequence[Instruction] = INSTRUCTIONS

    name = NAME
    samples = 1
    shown = ("followed",)

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return _LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Instruction]
    ) -> list[Trial]:
        """One batch of replies, greedy."""
        prompts = [item.prompt for item in chunk]
        sampling = Sampling(self.max_tokens)
        uses: Uses = "untrained" if system == CLEAR else "student"

        def make(pair: Pair) -> list[Trial]:
            return bench.ask("student", pair, prompts, sampling)

        key = {"ask": prompts, "sampling": vars(sampling)}
        return bench.trials(key, len(chunk), [uses], make)

    def row(self, item: Instruction, given: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a reply beside the reply itself."""
        return {
            "id": item.id,
            "question": item.prompt,
            "reference": "",
            "final": given.final,
            "correct": item.follows(given.final),
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """The share that was followed."""
        followed = [float(bool(samples[0]["correct"])) for samples in rows]
        return [Measure("followed", followed, compared=True)]
