"""A byte-level BPE tokenizer as GGUF holds it: tokens, their kinds, merges, and the split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.gguf_tokens import (
    CONTROL,
    NORMAL,
    PRETOKENIZERS,
    UNUSED,
    USER_DEFINED,
    is_qwen2,
    pre_tokenizer,
)


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` holds.

    Attributes:
        tokens: texts by id; byte-level ones but for added tokens, which are plain.
        kinds: of each token.
        merges: pairs joined by a space.
        pre: llama.cpp's name of the split before the merges.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str


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


def read_vocabulary(path: Path, rows: int, arch: str) -> Vocabulary:
    """The vocabulary of a ``tokenizer.json``.

    Args:
        path: the file.
        rows: rows of the model's embedding; those beyond the tokens get unused ones.
        arch: the model's architecture.

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
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"{path}: --format gguf writes byte-level BPE tokenizers, and this one is another"
        )
    pre = _kind(path, tokenizer)
    added = tokenizer.get("added_tokens") or []
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    named = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    for token in added:
        kind = CONTROL if token["special"] else USER_DEFINED
        named[token["id"]] = (token["content"], kind)
    stripping = [
        token["content"]
        for token in added
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if arch == "qwen2" and not is_qwen2(pre):
        raise UserError(f"{path}: a qwen2 model with the split of {pre} is not supported")
    if (tokenizer.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        raise UserError(f"{path}: llama.cpp does not normalise text as this tokenizer does")
    if stripping:
        raise UserError(
            f"{path}: the token {stripping[0]!r} takes spaces around it, or whole words only; "
            "llama.cpp cannot do that"
        )
    if max(named) >= rows:
        raise UserError(f"{path}: has {max(named) + 1} tokens, and the model {rows} rows for them")
    filled = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return Vocabulary([text for text, _ in filled], [kind for _, kind in filled], merges, pre)
