"""The parity bundle: what a model said here, for any tool that opens its export to be held against.

Two files in ``parity/``: ``bundle.json`` with the prompts of every role, the reference's greedy
continuations and its answers to problems; ``reference.safetensors`` with its log-probabilities.
Together a few MB at most. :mod:`mlx_fd.export.bundle_reading` reads it again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.files import write_atomic
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import form_of, is_right, read_final
from mlx_fd.problems.prompts import (
    FEEDBACK_OPENING,
    Feedback,
    answer_prompt,
    critique_prompt,
    feedback_prompt,
    final_prompt,
    merge_prompt,
    revise_prompt,
)
from mlx_fd.runs.records.bundle import BundleFile

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded

FOLDER = "parity"
CONTENT = "bundle.json"
REFERENCE: Final = "reference.safetensors"
FORMAT = 2
ROLES = ("answer", "feedback", "merge", "revise", "critique", "final")
ARRAYS = ("top_ids", "top_logprobs", "next_logprobs")  # of a prompt; in the file, all in a row
TOP = 64  # tokens a position whose log-probabilities are kept
ROLE_PROBLEMS = 3  # problems that go through every role
_CONTINUATION = 32  # tokens written in each role
_PROMPT_TAIL = 32  # positions of a prompt that are kept, its last ones
_ANSWER_TOKENS = 256
_BATCH = 16
_SENTINEL = "\u241fquestion\u241f"

Progress = Callable[[int, int], None]
"""Called with the model's turns done, and their number in all."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One role's prompt, and what the reference made of it.

    The P positions kept are those from ``begin`` on that predict a token of prompt and
    continuation: row i predicts token ``begin + i + 1`` of the two together.

    Attributes:
        role: one of ``ROLES``.
        problem: the problem's id.
        text: the prompt with its special tokens, up to where the model goes on.
        tokens: the same as ids.
        greedy: the reference's continuation, with the end token where it came.
        begin: the first position kept.
        top_ids: [P, TOP] int32, the likeliest tokens, likeliest first.
        top_logprobs: [P, TOP] float32, their log-probabilities; the rest of the mass is the tail's.
        next_logprobs: [P] float32, log-probabilities of the tokens that do come next.
    """

    role: str
    problem: str
    text: str
    tokens: tuple[int, ...]
    greedy: tuple[int, ...]
    begin: int
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    next_logprobs: NDArray[np.float32]

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return (*self.tokens, *self.greedy)

    @property
    def positions(self) -> int:
        """How many positions are kept."""
        return len(self.tokens) + len(self.greedy) - 1 - self.begin


@dataclass(frozen=True)
class Item:
    """A problem with the reference's answer.

    Attributes:
        id: the problem's.
        question: the problem's text.
        answer: the right one, in the canonical form of its kind.
        text: the reference's greedy answer.
        final: what it arrives at; ``None`` where that cannot be read.
        right: whether that is right; ``None`` where nobody knows.
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
    kind: str = "number"
    choices: tuple[str, ...] = ()
    also_right: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """The problem that is answered."""
        return Problem(
            self.id, self.question, "", self.answer, self.kind, self.choices, self.also_right
        )


@dataclass(frozen=True)
class Bundle:
    """A whole bundle.

    Attributes:
        vocab: tokens of the vocabulary; rows of the model beyond it are padding.
        eos: ids of the tokens that end a turn.
        before: an answer's prompt up to the question,
        after: and from the question on.
        max_answer_tokens: most tokens of an answer.
        prompts: the roles' prompts.
        items: the problems.
        pieces: texts of the tokens in the prompts' ``greedy`` and ``top_ids``, by id.
        reference: of the reference: ``sha256`` of weights and configuration, ``dtype``,
            ``device``, ``seed``.
        versions: of the software that made it.
        source: how the export came about, as its maker says.
    """

    vocab: int
    eos: tuple[int, ...]
    before: str
    after: str
    max_answer_tokens: int
    prompts: tuple[Prompt, ...]
    items: tuple[Item, ...]
    pieces: dict[int, str]
    reference: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any]


# ------------------------------------------------------------------------------------------ making


class _Reference:
    """The model that the bundle is made with, and the count of what it has done."""

    def __init__(self, loaded: Loaded, progress: Progress, total: int):
        self.loaded = loaded
        self._progress = progress
        self._done, self._total = 0, total
        progress(0, total)

    def did(self, turns: int) -> None:
        self._done += turns
        self._progress(self._done, self._total)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.loaded.tokenizer.encode(text, add_special_tokens=False))

    def write(self, texts: Sequence[str], most: int) -> list[tuple[tuple[int, ...], str]]:
        """Greedy continuations of prompts: tokens, and the text without the end token."""
        from mlx_fd.models.conversation import Conversation
        from mlx_fd.models.generation import generate
        from mlx_fd.models.writing import GenerateOptions, Sampling

        replies: list[tuple[tuple[int, ...], str]] = []
        for begin in range(0, len(texts), _BATCH):
            prompts = [self.encode(text) for text in texts[begin : begin + _BATCH]]
            turns = generate(
                self.loaded,
                [Conversation()] * len(prompts),
                prompts,
                Sampling(most),
                GenerateOptions(keep=False),
            )
            replies.extend((turn.tokens, turn.text) for turn in turns)
            self.did(len(turns))
        return replies


def _say_nothing(done: int, total: int) -> None:
    pass


def make_bundle(
    loaded: Loaded,
    *,
    problems: Sequence[Problem],
    seed: int,
    source: Mapping[str, Any],
    progress: Progress = _say_nothing,
) -> Bundle:
    """Let the reference speak.

    Three of the problems go through all roles: one growing chat, rendered anew for each role, so
    that every prompt is text whose tokens any tool can be asked for. All problems are answered.

    Args:
        loaded: the model as it is here; what is exported shall be the same.
        problems: at least one, of one kind, in words that the model's tokenizer knows.
        seed: chooses the problems that go through the roles.
        source: what to say of the export's origin; JSON values.
        progress: called with the turns done and their number.

    Raises:
        UserError: there is no problem, they are of several kinds, there is no chat
            template, or the model's logits are not finite.
    """
    from mlx_fd.models.backend import backend
    from mlx_fd.models.chat_template import check_conversation
    from mlx_fd.models.fingerprint import content_hash
    from mlx_fd.models.generation import chat_text
    from mlx_fd.runs.manifest import versions

    if not problems:
        raise UserError("a parity bundle needs at least one problem")
    if len({problem.kind for problem in problems}) > 1:
        raise UserError("a parity bundle needs problems with one kind of answers")
    check_conversation(loaded.template)
    chosen = random.Random(seed).sample(list(problems), min(ROLE_PROBLEMS, len(problems)))
    total = 2 * len(ROLES) * len(chosen) + len(problems)
    reference = _Reference(loaded, progress, total)
    drafts = [
        (role, problem, *drawn)
        for role, row in _conversations(reference, chosen)
        for problem, drawn in zip(chosen, row, strict=True)
    ]
    prompts = tuple(_scored(reference, *draft) for draft in drafts)
    form = form_of(problems[0])
    around = chat_text(loaded, [answer_prompt(_SENTINEL, form)]).split(_SENTINEL)
    if len(around) != 2:
        raise UserError(
            f"{loaded.path}: its chat template writes a message {len(around) - 1} times, so that "
            "no prompt can be taken apart; use a model with an ordinary template"
        )
    before, after = around
    items = tuple(_answered(reference, problems, before, after))
    spoken = {int(token) for prompt in prompts for token in (*prompt.greedy, *prompt.top_ids.flat)}
    return Bundle(
        vocab=loaded.vocab,
        eos=tuple(sorted(loaded.tokenizer.eos_token_ids)),
        before=before,
        after=after,
        max_answer_tokens=_ANSWER_TOKENS,
        prompts=prompts,
        items=items,
        pieces={token: loaded.tokenizer.decode([token]) for token in sorted(spoken)},
        reference={
            "sha256": content_hash(loaded.path),
            "dtype": str(loaded.dtype).removeprefix("mlx.core."),
            "device": backend().device,
            "seed": seed,
        },
        versions=versions(),
        source=dict(source),
    )


def _conversations(
    reference: _Reference, problems: Sequence[Problem]
) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Each role with, for each problem, the prompt's text and the greedy continuation."""
    from mlx_fd.models.generation import chat_text

    chats: list[list[str]] = [[] for _ in problems]
    feedbacks: list[Feedback] = []
    for role in ROLES:
        for index, (chat, problem) in enumerate(zip(chats, problems, strict=True)):
            if role == "answer":
                message = answer_prompt(problem.question, form_of(problem))
            elif role == "feedback":
                message = feedback_prompt()
            elif role == "merge":
                # The next problem's feedback stands in for the amateur's.
                other = feedbacks[(index + 1) % len(feedbacks)]
                message = merge_prompt(feedbacks[index], other)
            elif role == "revise":
                message = revise_prompt("", form_of(problem))
            elif role == "critique":
                message = critique_prompt()
            else:
                message = final_prompt(form_of(problem))
            chat.append(message)
        begun = FEEDBACK_OPENING if role == "feedback" else ""
        texts = [chat_text(reference.loaded, chat) + begun for chat in chats]
        written = reference.write(texts, _CONTINUATION)
        for chat, (_, text) in zip(chats, written, strict=True):
            chat.append(f"{begun} {text}".strip())
        if role == "feedback":
            feedbacks = [parsing.parse_feedback(chat[-1]) for chat in chats]
        yield role, [(text, tokens) for text, (tokens, _) in zip(texts, written, strict=True)]


def _scored(
    reference: _Reference, role: str, problem: Problem, text: str, greedy: tuple[int, ...]
) -> Prompt:
    from mlx_fd.export.logits import log_softmax, next_token_logits

    loaded, tokens = reference.loaded, reference.encode(text)
    begin = max(0, len(tokens) - 1 - _PROMPT_TAIL)
    sequence = (*tokens, *greedy)
    logprobs = log_softmax(next_token_logits(loaded.model, sequence, begin, loaded.vocab))
    if not np.isfinite(logprobs).all():
        raise UserError(
            f"{loaded.path}: the model's logits are not finite numbers on a {role} prompt; its "
            "weights are damaged"
        )
    kept = min(TOP, loaded.vocab)
    top = np.argsort(-logprobs, axis=-1, kind="stable")[:, :kept]
    reference.did(1)
    return Prompt(
        role=role,
        problem=problem.id,
        text=text,
        tokens=tokens,
        greedy=greedy,
        begin=begin,
        top_ids=top.astype(np.int32),
        top_logprobs=np.take_along_axis(logprobs, top, -1).astype(np.float32),
        next_logprobs=logprobs[np.arange(len(logprobs)), sequence[begin + 1 :]].astype(np.float32),
    )


def _answered(
    reference: _Reference, problems: Sequence[Problem], before: str, after: str
) -> Iterator[Item]:
    texts = [before + problem.question.strip() + after for problem in problems]
    for problem, (_, text) in zip(problems, reference.write(texts, _ANSWER_TOKENS), strict=True):
        final = read_final(text, problem)
        yield Item(
            id=problem.id,
            question=problem.question.strip(),
            answer=problem.answer,
            text=text,
            final=final,
            right=is_right(final, problem),
            kind=problem.kind,
            choices=problem.choices,
            also_right=problem.also_right,
        )


# ----------------------------------------------------------------------------------------- writing


def content_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 that seals ``bundle.json``: of all of it but the digest itself.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write ``folder/parity/``; its parents are made where missing.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.numpy import save

    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.concatenate([getattr(prompt, name) for prompt in bundle.prompts])
        for name in ARRAYS
    }
    data = save(arrays)
    content: BundleFile = {
        "format": FORMAT,
        "vocab": bundle.vocab,
        "eos": list(bundle.eos),
        "before": bundle.before,
        "after": bundle.after,
        "max_answer_tokens": bundle.max_answer_tokens,
        "prompts": [
            {
                "role": prompt.role,
                "problem": prompt.problem,
                "text": prompt.text,
                "tokens": list(prompt.tokens),
                "greedy": list(prompt.greedy),
                "begin": prompt.begin,
            }
            for prompt in bundle.prompts
        ],
        "items": [
            {
                "id": item.id,
                "question": item.question,
                "answer": item.answer,
                "text": item.text,
                "final": item.final,
                "right": item.right,
                "kind": item.kind,
                "choices": list(item.choices),
                "also_right": list(item.also_right),
            }
            for item in bundle.items
        ],
        "pieces": {str(token): piece for token, piece in bundle.pieces.items()},
        "reference": bundle.reference,
        "versions": bundle.versions,
        "source": bundle.source,
        REFERENCE: hashlib.sha256(data).hexdigest(),
    }
    write_atomic(target / REFERENCE, data)
    text = json.dumps(
        {"sha256": content_digest(content), **content}, ensure_ascii=False, allow_nan=False
    )
    write_atomic(target / CONTENT, text + "\n")
