"""SentencePiece's BPE: scores of pieces in GGUF files, ranks of merges in tokenizer.json.

SentencePiece (and llama.cpp after it) joins the two neighbours whose piece has the highest score;
``tokenizers`` joins the pair of the lowest rank. They agree where every way to split a piece into
two pieces is a merge, and the merges are in the order of their pieces' scores: so transformers
converts such a model, and so it is made and checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SPACE = "\u2581"
"""What stands for a space in a piece."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""The pieces for what no other piece has."""
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED = {"type": "Prepend", "prepend": SPACE}
# Spaces are gone by then, so that it splits nothing.
_NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def _pairs(piece: str, pieces: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ways to split a piece into two, in transformers' order: the longer first half first."""
    halves = ((piece[:at], piece[at:]) for at in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in halves if left in pieces and right in pieces]


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of pieces with these scores, those of the highest first."""
    ordered = sorted(scores, key=lambda piece: -scores[piece])
    return [pair for piece in ordered for pair in _pairs(piece, scores)]


def scores_of(pieces: Iterable[str], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Scores that make llama.cpp join pieces in the order of these merges.

    Args:
        pieces: all that may be joined or come of joining.
        merges: pairs, in the order in which they are taken.

    Returns:
        A score for each piece, at most 0; those that no merge makes have the lowest.

    Raises:
        ValueError: no scores do that; the message names a piece.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    known = dict.fromkeys(pieces)
    pairs = set(merges)
    before = -1
    for piece in sorted(first, key=first.__getitem__):
        if first[piece] < before:
            raise ValueError(f"merges to {piece!r} stand between those to another piece")
        before = last[piece]
    for piece in known:
        if missing := set(_pairs(piece, known)) - pairs:
            left, right = sorted(missing)[0]
            raise ValueError(f"{left!r} and {right!r} are not merged to the piece {piece!r}")
    if strange := first.keys() - known.keys():
        raise ValueError(f"there are merges to {sorted(strange)[0]!r}, which is no piece")
    lowest = -float(len(merges))
    return {piece: -float(first[piece]) if piece in first else lowest for piece in known}


def prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text, and what follows a special token, begins with a space.

    Args:
        tokenizer: the JSON of a ``tokenizer.json``.

    Raises:
        ValueError: text becomes pieces in a way that llama.cpp does not have.
    """
    normalizer, split = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if split is not None and split.get("type") == "Metaspace" and normalizer is None:
        scheme = split.get("prepend_scheme", "always")
        if split.get("replacement") == SPACE and not split.get("split", True):
            if scheme == "never":
                return False
            if scheme == "always":
                return True
        raise ValueError(f"spaces are marked by Metaspace with prepend_scheme {scheme!r}")
    if split not in (None, _NO_SPLIT):
        raise ValueError(f"text is split by {split.get('type')} first")
    if normalizer == _REPLACED:
        return False
    if normalizer == {"type": "Sequence", "normalizers": [_PREPENDED, _REPLACED]}:
        return True
    raise ValueError("spaces are not marked as SentencePiece does")


def new_tokenizer(
    scores: Mapping[str, float], ids: Mapping[str, int], unknown: str | None, *, prefix: bool
) -> Any:
    """A ``tokenizers.Tokenizer`` without added tokens.

    Args:
        scores: of the pieces that may be joined.
        ids: of all pieces.
        unknown: the piece for what no piece has, bytes aside.
        prefix: as :func:`prefixes_space`.

    Raises:
        Exception: tokenizers cannot make one.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab=dict(ids),
            merges=merges_of(scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
