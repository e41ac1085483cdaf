"""Reading a parity bundle, which may come from anywhere: every value is checked before it is used.

Who reads one needs neither MLX nor the model's tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.export.bundle import (
    ARRAYS,
    CONTENT,
    FOLDER,
    FORMAT,
    REFERENCE,
    ROLES,
    TOP,
    Bundle,
    Item,
    Prompt,
    content_digest,
)
from mlx_fd.problems.kinds import is_right
from mlx_fd.registry import KINDS

# Far above what is ever written: 18 prompts of 64 positions are 0.6 MB.
_LARGEST = {CONTENT: 32 << 20, REFERENCE: 64 << 20}
_ROUNDING = 1e-3  # by which float32 probabilities may sum to more than 1
# As str(Fraction) writes it. final_answer's numbers have at most 60 characters and exponent 60.
_FRACTION = re.compile(r"-?[0-9]{1,120}(?:/[1-9][0-9]{0,119})?")
_ID = re.compile(r"[0-9]{1,8}")
_KINDS = {str: "text", int: "whole number", bool: "true or false", dict: "object", list: "list"}
_AGAIN = "export the model again"

_Kind = TypeVar("_Kind")


class _Fields:
    """A JSON object whose values are asked for by name and type."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object; {_AGAIN}")
        self._value, self.where = value, where

    def _get(self, name: str, kind: type[_Kind]) -> _Kind:
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
            _Fields(row, f"{self.where}: {name}[{index}]")
            for index, row in enumerate(self._get(name, list))
        ]

    def ids(self, name: str, vocab: int) -> tuple[int, ...]:
        values = self._get(name, list)
        if not all(type(value) is int and 0 <= value < vocab for value in values):
            raise UserError(f"{self.where}: {name} are not all ids below {vocab}; {_AGAIN}")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        values = _Fields(dict(enumerate(self._get(name, list))), f"{self.where}: {name}")
        return tuple(values.text(place) for place in values._value)

    def final(self, name: str, kind: str) -> str:
        text = self.text(name)
        # Of one value there is one way to write it, and nobody computes 1e999999999.
        if kind == "number" and not (_FRACTION.fullmatch(text) and str(Fraction(text)) == text):
            raise UserError(f"{self.where}: {name} is no number; {_AGAIN}")
        return text


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
        raise UserError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    fields = _Fields(value, str(path))
    if (version := fields.whole("format", 1, 1 << 30)) != FORMAT:
        raise UserError(
            f"{path} has format {version}, and this mlx-fd reads {FORMAT}: use the version of "
            "mlx-fd that made the export, or export again"
        )
    try:
        digest = content_digest({k: v for k, v in value.items() if k != "sha256"})
    except ValueError as error:
        raise UserError(f"{path} has a number that is not finite; {_AGAIN}") from error
    if fields.text("sha256") != digest:
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
        max_answer_tokens=fields.whole("max_answer_tokens", 1, 1 << 16),
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
    kind, right = row.text("kind"), None if row.null("right") else row.flag("right")
    if kind not in KINDS:
        raise UserError(f"{row.where}: there is no kind of answers {kind!r}; {_AGAIN}")
    item = Item(
        id=row.text("id"),
        question=row.text("question"),
        answer=row.final("answer", kind),
        text=row.text("text"),
        # A final answer that could not be read is null.
        final=None if row.null("final") else row.final("final", kind),
        right=right,
        kind=kind,
        choices=row.texts("choices"),
        also_right=row.texts("also_right"),
    )
    if right != is_right(item.final, item.problem):
        raise UserError(f"{row.where}: right is {right}, but its answers say otherwise; {_AGAIN}")
    return item


def _pieces(fields: _Fields, vocab: int) -> dict[int, str]:
    pieces = _Fields(fields.object("pieces"), f"{fields.where}: pieces")
    texts = {}
    for name in fields.object("pieces"):
        if not _ID.fullmatch(name) or int(name) >= vocab:
            raise UserError(f"{pieces.where}: {name!r} is no id below {vocab}; {_AGAIN}")
        texts[int(name)] = pieces.text(name)
    return texts


def _prompts(rows: Sequence[_Fields], data: bytes, vocab: int, path: Path) -> tuple[Prompt, ...]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}); {_AGAIN}") from error
    prompts, offset = [], 0
    for row in rows:
        tokens, greedy = row.ids("tokens", vocab), row.ids("greedy", vocab)
        if row.text("role") not in ROLES or not tokens or not greedy:
            raise UserError(f"{row.where} has no known role, no tokens or no answer; {_AGAIN}")
        begin = row.whole("begin", 0, len(tokens) - 1)
        end = offset + len(tokens) + len(greedy) - 1 - begin
        prompts.append((row, tokens, greedy, begin, slice(offset, end)))
        offset = end
    if not prompts:
        raise UserError(f"{path.parent / CONTENT} has no prompts; {_AGAIN}")
    _check_arrays(arrays, offset, vocab, path)
    return tuple(
        Prompt(
            row.text("role"),
            row.text("problem"),
            row.text("text"),
            tokens,
            greedy,
            begin,
            *(arrays[name][rows_of] for name in ARRAYS),
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
    ids, top, following = (arrays[name] for name in ARRAYS)
    if ids.min() < 0 or ids.max() >= vocab or (np.diff(np.sort(ids, axis=-1)) == 0).any():
        raise UserError(f"{path}: top_ids are not different ids below {vocab}; {_AGAIN}")
    if not (np.isfinite(top).all() and np.isfinite(following).all()):
        raise UserError(f"{path}: log-probabilities are not all finite numbers; {_AGAIN}")
    # Absurd ones have no exponential; they are above 0 either way.
    mass = np.exp(np.minimum(top.astype(np.float64), 1)).sum(-1)
    if (np.diff(top) > 0).any() or (mass > 1 + _ROUNDING).any() or (following > 0).any():
        raise UserError(f"{path}: log-probabilities do not fall, or are above 0; {_AGAIN}")
