"""The parity bundle: what a model said here, for any tool that opens its export to be held against.

Two files in ``parity/``: ``bundle.json`` with the prompts of every role, the reference's greedy
continuations and its answers to problems; ``reference.safetensors`` with its log-probabilities.
Together a few MB at most. Who reads one needs neither MLX nor the model's tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_fd import roles
from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.runs import write_atomic

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded

FOLDER = "parity"
CONTENT = "bundle.json"
REFERENCE = "reference.safetensors"
FORMAT = 1
ROLES = ("answer", "feedback", "merge", "revise", "critique", "final")
TOP = 64  # tokens a position whose log-probabilities are kept
ROLE_PROBLEMS = 3  # problems that go through every role
_CONTINUATION = 32  # tokens written in each role
_PROMPT_TAIL = 32  # positions of a prompt that are kept, its last ones
_ANSWER_TOKENS = 256
_BATCH = 16
_SENTINEL = "\u241fquestion\u241f"
# Far above what is ever written: 18 prompts of 64 positions are 0.6 MB.
_LARGEST = {CONTENT: 32 << 20, REFERENCE: 64 << 20}
_ROUNDING = 1e-3  # by which float32 probabilities may sum to more than 1
_FRACTION = re.compile(r"-?[0-9]{1,120}(?:/[0-9]*[1-9][0-9]*)?")
_KINDS = {str: "text", int: "whole number", bool: "true or false", dict: "object", list: "list"}
_AGAIN = "export the model again"

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
        answer: the right number.
        text: the reference's greedy answer.
        final: the number it arrives at; ``None`` where none can be read.
        right: whether that is the right one.
    """

    id: str
    question: str
    answer: Fraction
    text: str
    final: Fraction | None
    right: bool


@dataclass(frozen=True)
class Bundle:
    """A whole bundle.

    Attributes:
        vocab: tokens of the vocabulary; rows of the model beyond it are padding.
        eos: ids of the tokens that end a turn.
        before: an answer's prompt up to the question,
        after: and from the question on.
        answer_tokens: most tokens of an answer.
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
    answer_tokens: int
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
        from mlx_fd.generation import Conversation, Sampling, generate

        found: list[tuple[tuple[int, ...], str]] = []
        for place in range(0, len(texts), _BATCH):
            prompts = [self.encode(text) for text in texts[place : place + _BATCH]]
            turns = generate(
                self.loaded, [Conversation()] * len(prompts), prompts, Sampling(most), keep=False
            )
            found.extend((turn.tokens, turn.text) for turn in turns)
            self.did(len(turns))
        return found


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
        problems: at least one, in words that the model's tokenizer knows.
        seed: chooses the problems that go through the roles.
        source: what to say of the export's origin; JSON values.
        progress: told of every turn.

    Raises:
        UserError: there is no problem, no chat template, or the model's logits are not finite.
    """
    from mlx_fd.backend import backend
    from mlx_fd.generation import chat_text
    from mlx_fd.models.loading import content_hash
    from mlx_fd.session import versions

    if not problems:
        raise UserError("a parity bundle needs at least one problem")
    if not loaded.tokenizer.has_chat_template:
        raise UserError(
            f"{loaded.path}: its tokenizer has no chat template, and the roles' prompts are chats; "
            "use an instruction-tuned model"
        )
    chosen = random.Random(seed).sample(list(problems), min(ROLE_PROBLEMS, len(problems)))
    total = 2 * len(ROLES) * len(chosen) + len(problems)
    reference = _Reference(loaded, progress, total)
    drafts = [
        (role, problem, *drawn)
        for role, row in _conversations(reference, chosen)
        for problem, drawn in zip(chosen, row, strict=True)
    ]
    prompts = tuple(_scored(reference, *draft) for draft in drafts)
    before, after = chat_text(loaded.tokenizer, [roles.answer_prompt(_SENTINEL)]).split(_SENTINEL)
    items = tuple(_answered(reference, problems, before, after))
    spoken = {int(token) for prompt in prompts for token in (*prompt.greedy, *prompt.top_ids.flat)}
    return Bundle(
        vocab=loaded.vocab,
        eos=tuple(sorted(loaded.tokenizer.eos_token_ids)),
        before=before,
        after=after,
        answer_tokens=_ANSWER_TOKENS,
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
    from mlx_fd.generation import chat_text

    chats: list[list[str]] = [[] for _ in problems]
    feedbacks: list[roles.Feedback] = []
    for role in ROLES:
        for place, (chat, problem) in enumerate(zip(chats, problems, strict=True)):
            if role == "answer":
                message = roles.answer_prompt(problem.question)
            elif role == "feedback":
                message = roles.feedback_prompt()
            elif role == "merge":
                # The next problem's feedback stands in for the amateur's.
                other = feedbacks[(place + 1) % len(feedbacks)]
                message = roles.merge_prompt(feedbacks[place], other)
            elif role == "revise":
                message = roles.revise_prompt("")
            elif role == "critique":
                message = roles.critique_prompt()
            else:
                message = roles.final_prompt()
            chat.append(message)
        begun = roles.FEEDBACK_OPENING if role == "feedback" else ""
        texts = [chat_text(reference.loaded.tokenizer, chat) + begun for chat in chats]
        written = reference.write(texts, _CONTINUATION)
        for chat, (_, text) in zip(chats, written, strict=True):
            chat.append(f"{begun} {text}".strip())
        if role == "feedback":
            feedbacks = [roles.parse_feedback(chat[-1]) for chat in chats]
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
        final = roles.final_answer(text)
        right = roles.same_answer(final, problem.answer)
        yield Item(problem.id, problem.question.strip(), problem.answer, text, final, right)


# ----------------------------------------------------------------------------------------- writing

_ARRAYS = ("top_ids", "top_logprobs", "next_logprobs")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
        for name in _ARRAYS
    }
    data = save(arrays)
    content = {
        "format": FORMAT,
        "vocab": bundle.vocab,
        "eos": list(bundle.eos),
        "before": bundle.before,
        "after": bundle.after,
        "answer_tokens": bundle.answer_tokens,
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
                "answer": str(item.answer),
                "text": item.text,
                "final": None if item.final is None else str(item.final),
                "right": item.right,
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
    text = json.dumps({"sha256": _digest(content), **content}, ensure_ascii=False, allow_nan=False)
    write_atomic(target / CONTENT, text + "\n")


# ----------------------------------------------------------------------------------------- reading


class _Fields:
    """A JSON object whose values are asked for by name and type."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise UserError(f"{where} is no JSON object; {_AGAIN}")
        self._value, self.where = value, where

    def _get(self, name: str, kind: type) -> Any:
        value = self._value.get(name)
        # JSON's true is no number, though Python's True is.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where}: {name} is missing or is no {_KINDS[kind]}; {_AGAIN}")
        return value

    def null(self, name: str) -> bool:
        return name in self._value and self._value[name] is None

    def text(self, name: str) -> str:
        value = self._get(name, str)
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{self.where}: {name} is no Unicode text; {_AGAIN}")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self._get(name, int)
        if not low <= value <= high:
            raise UserError(f"{self.where}: {name} is {value}, not {low} to {high}; {_AGAIN}")
        return value

    def flag(self, name: str) -> bool:
        return self._get(name, bool)

    def object(self, name: str) -> dict[str, Any]:
        return self._get(name, dict)

    def rows(self, name: str) -> list[_Fields]:
        return [
            _Fields(row, f"{self.where}: {name}[{place}]")
            for place, row in enumerate(self._get(name, list))
        ]

    def ids(self, name: str, vocab: int) -> tuple[int, ...]:
        values = self._get(name, list)
        if not all(type(value) is int and 0 <= value < vocab for value in values):
            raise UserError(f"{self.where}: {name} are not all ids below {vocab}; {_AGAIN}")
        return tuple(values)

    def number(self, name: str) -> Fraction:
        text = self.text(name)
        # Fraction itself would spend hours on 1e999999999.
        if not _FRACTION.fullmatch(text):
            raise UserError(f"{self.where}: {name} is no number; {_AGAIN}")
        return Fraction(text)


def read_bundle(folder: Path) -> Bundle:
    """Read and check ``folder/parity/``.

    Raises:
        UserError: a file is missing, damaged, changed since it was written, or holds what no
            bundle can; the message names the file and the place in it.
    """
    content, data = (_bytes(folder / FOLDER / name) for name in (CONTENT, REFERENCE))
    path = folder / FOLDER / CONTENT
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); {_AGAIN}") from error
    fields = _Fields(value, str(path))
    if (found := fields.whole("format", 1, 1 << 30)) != FORMAT:
        raise UserError(
            f"{path} has format {found}, and this mlx-fd reads {FORMAT}: use the version of "
            "mlx-fd that made the export, or export again"
        )
    if fields.text("sha256") != _digest({k: v for k, v in value.items() if k != "sha256"}):
        raise UserError(f"{path} was changed after it was written; {_AGAIN}")
    if fields.text(REFERENCE) != hashlib.sha256(data).hexdigest():
        raise UserError(
            f"{folder / FOLDER / REFERENCE} is damaged, or belongs to another bundle.json; {_AGAIN}"
        )
    vocab = fields.whole("vocab", 2, 1 << 24)
    return Bundle(
        vocab=vocab,
        eos=fields.ids("eos", vocab),
        before=fields.text("before"),
        after=fields.text("after"),
        answer_tokens=fields.whole("answer_tokens", 1, 1 << 16),
        prompts=_prompts(fields.rows("prompts"), data, vocab, folder / FOLDER / REFERENCE),
        items=tuple(_item(row) for row in fields.rows("items")),
        pieces=_pieces(fields, vocab),
        reference=fields.object("reference"),
        versions=fields.object("versions"),
        source=fields.object("source"),
    )


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST[path.name]:
            raise UserError(f"{path} has {size} bytes: it is no part of a parity bundle; {_AGAIN}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: name a directory made by mlx-fd export, which has a parity bundle"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _item(row: _Fields) -> Item:
    # A final answer that could not be read is null.
    final = None if row.null("final") else row.number("final")
    answer, right = row.number("answer"), row.flag("right")
    if right != roles.same_answer(final, answer):
        raise UserError(f"{row.where}: right is {right}, but its answers say otherwise; {_AGAIN}")
    return Item(row.text("id"), row.text("question"), answer, row.text("text"), final, right)


def _pieces(fields: _Fields, vocab: int) -> dict[int, str]:
    pieces = _Fields(fields.object("pieces"), f"{fields.where}: pieces")
    found = {}
    for name in fields.object("pieces"):
        if not re.fullmatch(r"[0-9]{1,8}", name) or int(name) >= vocab:
            raise UserError(f"{pieces.where}: {name!r} is no id below {vocab}; {_AGAIN}")
        found[int(name)] = pieces.text(name)
    return found


def _prompts(rows: Sequence[_Fields], data: bytes, vocab: int, path: Path) -> tuple[Prompt, ...]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); {_AGAIN}") from error
    prompts, place = [], 0
    for row in rows:
        tokens, greedy = row.ids("tokens", vocab), row.ids("greedy", vocab)
        if row.text("role") not in ROLES or not tokens or not greedy:
            raise UserError(f"{row.where} has no known role, no tokens or no answer; {_AGAIN}")
        begin = row.whole("begin", 0, len(tokens) - 1)
        end = place + len(tokens) + len(greedy) - 1 - begin
        prompts.append((row, tokens, greedy, begin, slice(place, end)))
        place = end
    if not prompts:
        raise UserError(f"{path.parent / CONTENT} has no prompts; {_AGAIN}")
    _check_arrays(arrays, place, vocab, path)
    return tuple(
        Prompt(
            row.text("role"),
            row.text("problem"),
            row.text("text"),
            tokens,
            greedy,
            begin,
            *(arrays[name][rows_of] for name in _ARRAYS),
        )
        for row, tokens, greedy, begin, rows_of in prompts
    )


def _check_arrays(
    arrays: Mapping[str, NDArray[Any]], positions: int, vocab: int, path: Path
) -> None:
    kept = min(TOP, vocab)
    wanted = {
        "top_ids": ((positions, kept), np.int32),
        "top_logprobs": ((positions, kept), np.float32),
        "next_logprobs": ((positions,), np.float32),
    }
    for name, (shape, kind) in wanted.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype != kind:
            raise UserError(
                f"{path}: {name} is missing, or is not {np.dtype(kind)} of shape {shape}; {_AGAIN}"
            )
    ids, top, following = (arrays[name] for name in _ARRAYS)
    if ids.min() < 0 or ids.max() >= vocab or (np.diff(np.sort(ids, axis=-1)) == 0).any():
        raise UserError(f"{path}: top_ids are not different ids below {vocab}; {_AGAIN}")
    if not (np.isfinite(top).all() and np.isfinite(following).all()):
        raise UserError(f"{path}: log-probabilities are not all finite numbers; {_AGAIN}")
    mass = np.exp(top.astype(np.float64)).sum(-1)
    if (np.diff(top) > 0).any() or (mass > 1 + _ROUNDING).any() or (following > 0).any():
        raise UserError(f"{path}: log-probabilities do not fall, or are above 0; {_AGAIN}")
