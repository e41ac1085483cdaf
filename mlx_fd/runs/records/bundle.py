"""A parity bundle: ``parity/bundle.json``."""

from __future__ import annotations

from typing import Any, TypedDict


class BundlePromptRow(TypedDict):
    """A role's prompt of a parity bundle; its log-probabilities are in ``reference.safetensors``.

    Attributes:
        role: the turn: answer, feedback, merge, revise, critique or final.
        problem: the problem's id.
        text: the prompt as the chat template writes it.
        tokens: its token ids.
        greedy: token ids of the greedy continuation.
        begin: index of the first position that is kept.
    """

    role: str
    problem: str
    text: str
    tokens: list[int]
    greedy: list[int]
    begin: int


class BundleItemRow(TypedDict):
    """A problem of a parity bundle.

    Attributes:
        id: the problem's.
        question: its text.
        answer: the right answer.
        text: the model's greedy answer.
        final: the final answer read in it; null where none could be read.
        right: whether that is right; null where no right answer is known.
        kind: of the answer.
        choices: what there is to choose from.
        also_right: other right answers.
    """

    id: str
    question: str
    answer: str
    text: str
    final: str | None
    right: bool | None
    kind: str
    choices: list[str]
    also_right: list[str]


# Its key is the arrays' file: no name of a field.
_BundleDigest = TypedDict("_BundleDigest", {"reference.safetensors": "str"})


class BundleFile(_BundleDigest):
    """``parity/bundle.json``.

    Attributes:
        format: of the file.
        vocab: tokens that can be drawn.
        eos: ids of the end tokens.
        before: what the chat template writes before a message.
        after: what it writes after it.
        max_answer_tokens: maximum tokens of an answer.
        prompts: one for each role and problem.
        items: the problems.
        pieces: the text of tokens, by id.
        reference: the model and the machine that the bundle was made with.
        versions: of the packages.
        source: what was exported.
        reference.safetensors: digest of the file with the arrays.
    """

    format: int
    vocab: int
    eos: list[int]
    before: str
    after: str
    max_answer_tokens: int
    prompts: list[BundlePromptRow]
    items: list[BundleItemRow]
    pieces: dict[str, str]
    reference: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any]
