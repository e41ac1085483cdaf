"""A tokenizer as GGUF holds it: tokens, their kinds, merges and the split, or scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.models import gguf_sentencepiece
from mlx_fd.models.gguf_tokens import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    PRETOKENIZERS,
    SENTENCEPIECE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_qwen2,
    pre_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` holds.

    Attributes:
        model: llama.cpp's name of the kind of tokenizer.
        pre: its name of the split before the merges.
        tokens: texts by id; byte-level ones but for added tokens, which are plain.
        kinds: of each token.
        merges: of byte-level BPE: pairs joined by a space.
        scores: of SentencePiece: of each token.
        space_prefix: whether a text begins with a space.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False


def _split(value: Any) -> Any:
    """A pre-tokenizer's JSON without what does not change its splits."""
    if isinstance(value, dict):
        return {key: _split(part) for key, part in value.items() if key != "trim_offsets"}
    return [_split(part) for part in value] if isinstance(value, list) else value


def _kind(path: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's split; where it has several, the first in the table."""
    split = _split(tokenizer.get("pre_tokenizer"))
    merged = bool(tokenizer["model"].get("ignore_merges"))
    for name, known in PRETOKENIZERS.items():
        content = json.loads(pre_tokenizer(name).__getstate__())
        if _split(content) == split and known.ignore_merges == merged:
            return name
    raise UserError(
        f"{path}: llama.cpp has no tokenizer that splits text as this one does; those known here "
        f"are {', '.join(PRETOKENIZERS)}. --format mlx and --format hf keep any tokenizer"
    )


def read_vocabulary(
    path: Path, rows: int, arch: str, used: Mapping[int, AddedToken] | None = None
) -> Vocabulary:
    """The vocabulary of a ``tokenizer.json``.

    Args:
        path: the file.
        rows: rows of the model's embedding; those beyond the tokens get unused ones.
        arch: the model's architecture.
        used: the added tokens by id as transformers has them, which takes some from files beside;
            ``None``: those of the file alone.

    Raises:
        UserError: it cannot be read, or llama.cpp would tokenise otherwise.
    """
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        # It checks every field's type, so what follows can rely on them.
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises the bare class
        raise UserError(f"{path}: this is no tokenizer.json ({error})") from error
    tokenizer = json.loads(text)
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{path}: --format gguf writes tokenizers that merge (byte-level BPE, SentencePiece), "
            f"and this one is {model.get('type')}"
        )
    written = tokenizer.get("added_tokens") or []
    beside = {**(used or {})}
    for one in written:
        beside.pop(one["id"], None)
    # Without a row they are plain text, as open_tokenizer has it (Gemma 3's token for images).
    added = [
        one
        for one in (*written, *(_as_json(*token) for token in beside.items()))
        if one["id"] < rows or not one["special"]
    ]
    stripping = [
        token["content"]
        for token in added
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if stripping:
        raise UserError(
            f"{path}: the token {stripping[0]!r} takes spaces around it, or whole words only; "
            "llama.cpp cannot do that"
        )
    named = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    for token in added:
        kind = CONTROL if token["special"] else USER_DEFINED
        named[token["id"]] = (token["content"], kind)
    if max(named) >= rows:
        raise UserError(f"{path}: has {max(named) + 1} tokens, and the model {rows} rows for them")
    if model.get("byte_fallback"):
        return _sentencepiece(path, tokenizer, named, rows)
    pre = _kind(path, tokenizer)
    if arch == "qwen2" and not is_qwen2(pre):
        raise UserError(f"{path}: a qwen2 model with the split of {pre} is not supported")
    if (tokenizer.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        raise UserError(f"{path}: llama.cpp does not normalise text as this tokenizer does")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = _filled(named, rows)
    return Vocabulary(BYTE_LEVEL, pre, tokens, kinds, merges=merges)


def _as_json(number: int, token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer.json has it."""
    flags = ("content", "special", "lstrip", "rstrip", "single_word")
    return {"id": number, **{name: getattr(token, name) for name in flags}}


def _filled(named: dict[int, tuple[str, int]], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and kinds of all rows."""
    filled = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _sentencepiece(
    path: Path, tokenizer: dict[str, Any], named: dict[int, tuple[str, int]], rows: int
) -> Vocabulary:
    """The vocabulary of a tokenizer that was SentencePiece's."""
    model = tokenizer["model"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    unknown = model.get("unk_token")
    for number, (token, kind) in named.items():
        if token in gguf_sentencepiece.BYTES:
            named[number] = (token, BYTE)
        elif token == unknown:
            named[number] = (token, UNKNOWN)
        elif kind == USER_DEFINED and gguf_sentencepiece.SPACE in token:
            # As a text it is spaces, which are joined like any others.
            named[number] = (token, NORMAL)
    pieces = [token for token, kind in named.values() if kind == NORMAL]
    try:
        prefix = gguf_sentencepiece.prefixes_space(tokenizer)
        joined = set(pieces)
        merges = [(left, right) for left, right in pairs if left + right in joined]
        scores = gguf_sentencepiece.scores_of(pieces, merges)
        if missing := gguf_sentencepiece.BYTES - {token for token, _ in named.values()}:
            raise ValueError(f"it has no token for the byte {sorted(missing)[0]}")
    except ValueError as error:
        raise UserError(
            f"{path}: llama.cpp has no tokenizer that splits text as this one does ({error}); "
            "--format mlx and --format hf keep any tokenizer"
        ) from error
    tokens, kinds = _filled(named, rows)
    return Vocabulary(
        SENTENCEPIECE,
        "default",
        tokens,
        kinds,
        scores=[scores.get(token, -1000.0) for token in tokens],
        space_prefix=prefix,
    )
