"""Thoughts in what a model writes: where they begin and end, and what is left without them.

A reasoning model thinks between marks before it replies. What it thinks is no answer, no feedback
and no score. Each family has marks of its own (:data:`FAMILIES`), and a text has those of one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family of models marks its thoughts.

    Attributes:
        name: of the family, for errors.
        start: what begins a thought.
        end: what ends it.
        open: what its models write up to a thought's first word; begins with ``start``.
        close: what they write from a thought's last word on; holds ``end``.
        reply: what they write between ``end`` and the reply, where their template does not say.
        starts_reply: a mark that begins the reply; empty: the reply is what no thought holds.
        tokens: the marks' tokens, where its tokenizers have some of their own for them.
        around: marks before and after the reply, which is read without them and where they miss.
    """

    name: str
    start: str
    end: str
    open: str
    close: str
    reply: str = ""
    starts_reply: str = ""
    tokens: tuple[str, ...] = ()
    around: tuple[str, ...] = ()

    @property
    def marks(self) -> re.Pattern[str]:
        """Matches a mark, by its group's name."""
        return _MARKS[self.name]


def _tags(name: str, start: str, end: str) -> Family:
    """A family whose models write a thought as Qwen3 and DeepSeek-R1 do, in lines of its own."""
    return Family(name, start, end, start + "\n", "\n" + end, "\n\n", tokens=(start, end))


FAMILIES = (
    _tags("think", "<think>", "</think>"),  # Qwen3, DeepSeek-R1, Nemotron, GLM, SmolLM3, LFM2.5
    Family(
        "mistral",  # Magistral, Ministral 3
        "[THINK]",
        "[/THINK]",
        "[THINK]",
        "[/THINK]",
        tokens=("[THINK]", "[/THINK]"),
    ),
    Family(
        "harmony",  # gpt-oss
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
        ("<|channel|>", "<|message|>", "<|end|>"),
    ),
    Family(
        "gemma4",
        "<|channel>thought",
        "<channel|>",
        "<|channel>thought\n",
        "<channel|>",
        tokens=("<|channel>", "<channel|>"),
    ),
    _tags("seed", "<seed:think>", "</seed:think>"),
    _tags("longcat", "<longcat_think>", "</longcat_think>"),
    _tags("muse", "<|think:start|>", "<|think:end|>"),
    Family(
        "openthoughts",  # OpenThinker, Sky-T1
        "<|begin_of_thought|>",
        "<|end_of_thought|>",
        "<|begin_of_thought|>\n\n",
        "\n\n<|end_of_thought|>",
        "\n\n<|begin_of_solution|>\n\n",
        tokens=("<|begin_of_thought|>", "<|end_of_thought|>"),
        around=("<|begin_of_solution|>", "<|end_of_solution|>"),
    ),
    _tags("exaone", "<thought>", "</thought>"),  # EXAONE Deep
    _tags("kimi", "\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL Thinking
)
"""The families whose thoughts are told from their replies."""

_MARKS = {
    family.name: re.compile(
        f"(?P<start>{re.escape(family.start)})|(?P<end>{re.escape(family.end)})"
        + (f"|(?P<reply>{re.escape(family.starts_reply)})" if family.starts_reply else "")
        + (f"|(?P<around>{'|'.join(map(re.escape, family.around))})" if family.around else "")
    )
    for family in FAMILIES
}


@dataclass(frozen=True)
class Split:
    """A text without its thoughts.

    Attributes:
        thought: what was thought, without marks; empty: nothing.
        reply: what was said; empty where the text ends before anything is.
        begin: index in the text at which the reply begins.
        end: index behind its last character.
    """

    thought: str
    reply: str
    begin: int
    end: int


def family_in(text: str) -> Family | None:
    """The family whose marks a text has: that of the first mark in it."""
    found = [
        (match.start(), place)
        for place, family in enumerate(FAMILIES)
        if (match := family.marks.search(text))
    ]
    return FAMILIES[min(found)[1]] if found else None


def split(text: str, family: Family | None = None) -> Split:
    """Take a text apart into what was thought and what was said.

    What was said last counts, where thoughts stand between. A thought that is never ended goes to
    the end of the text: cut off there, it has no reply. One that is ended without having begun was
    begun by the prompt.

    Args:
        text: as a model wrote it.
        family: whose marks it has; ``None``: those that are found in it.

    Returns:
        Thought and reply, both without white space around them.
    """
    family = family or family_in(text)
    if family is None:
        return Split("", text.strip(), 0, len(text))
    marks = [(match.lastgroup, *match.span()) for match in family.marks.finditer(text)]
    kinds = [kind for kind, _, _ in marks]
    # Ended without having begun: the prompt began it. In harmony every message has an end.
    begun = kinds[:1] == ["end"] and (not family.starts_reply or "reply" in kinds)
    state, place = "thought" if begun else "said", 0
    pieces: list[tuple[str, int, int]] = []
    for kind, begin, end in [*marks, ("", len(text), len(text))]:
        # Before harmony's first channel stands no more than whose message it is.
        is_head = family.starts_reply and not place and kind in ("start", "reply")
        pieces.append(("between" if is_head else state, place, begin))
        ended = "between" if family.starts_reply else "said"
        state, place = {"start": "thought", "end": ended}.get(kind or "", "said"), end
    said = [(a, b) for kind, a, b in pieces if kind == "said" and text[a:b].strip()]
    begin, end = said[-1] if said else (len(text), len(text))
    thoughts = (text[a:b].strip() for kind, a, b in pieces if kind == "thought")
    return Split("\n".join(filter(None, thoughts)), text[begin:end].strip(), begin, end)


def without_thoughts(text: str) -> str:
    """What a text says beside its thoughts: the text itself where it has none."""
    found = split(text)
    return text if found.end - found.begin == len(text) else found.reply
