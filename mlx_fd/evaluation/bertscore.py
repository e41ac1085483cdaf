"""BERTScore (Zhang et al., ICLR 2020, arXiv 1904.09675): texts compared token by token in context.

Every token of one text is matched with the most similar one of the other, by the cosine of their
contextual vectors. Precision is the mean over the candidate's tokens, recall over the reference's,
F1 their harmonic mean. The definition is the one of the authors' package, but for what a batch's
padding does there (a token that is like none of the other text's counts 0 instead of less). Another
encoder or layer gives other numbers, so the signature says which.
"""

from __future__ import annotations

import csv
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_fd.errors import UserError
from mlx_fd.evaluation.encoder import Encoder
from mlx_fd.evaluation.text import References, as_lists

_CHUNK = 64


class Triple(NamedTuple):
    """Precision, recall and F1."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class BertScore:
    """The scores of each candidate, and how they came about.

    Attributes:
        scores: one for each candidate.
        signature: encoder, layer, weights (a fingerprint), idf and rescaling.
    """

    scores: tuple[Triple, ...]
    signature: str


def match(
    candidate: ArrayLike,
    reference: ArrayLike,
    candidate_weights: ArrayLike,
    reference_weights: ArrayLike,
) -> Triple:
    """BERTScore of one pair, given its vectors.

    Args:
        candidate: the candidate's vectors, (tokens, width); of any length but 0.
        reference: the reference's, (tokens, width).
        candidate_weights: how much each token counts, (tokens,). A token of weight 0 still may be
            what another is matched with.
        reference_weights: the same for the reference.

    Returns:
        P = sum_i w_i max_j cos(c_i, r_j) / sum_i w_i, R likewise over j, F1 = 2PR / (P + R); all 0
        where the tokens of either text weigh nothing.
    """
    w, v = np.asarray(candidate_weights, np.float64), np.asarray(reference_weights, np.float64)
    if not w.sum() or not v.sum():
        return Triple(0.0, 0.0, 0.0)
    cosine = _unit(candidate) @ _unit(reference).T
    p = float(w @ cosine.max(axis=1) / w.sum())
    q = float(v @ cosine.max(axis=0) / v.sum())
    return Triple(p, q, 2 * p * q / (p + q) if p + q else 0.0)


def _unit(vectors: ArrayLike) -> NDArray[np.float64]:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def idf_weights(references: Sequence[Sequence[int]]) -> Callable[[int], float]:
    """How rare a token is among the references: log((N + 1) / (df + 1)).

    Args:
        references: token ids of each of the N references.

    Returns:
        The weight of a token id. A token of every reference, such as ``[CLS]``, weighs 0; one of
        none log(N + 1).
    """
    frequency = Counter(token for tokens in references for token in set(tokens))
    return lambda token: math.log((len(references) + 1) / (frequency[token] + 1))


def default_layer(encoder: Encoder) -> int:
    """Three quarters of the blocks, rounded up: 5 of 6, 9 of 12, 18 of 24.

    These are the layers that the authors found to agree best with people's judgement for BERT
    models of these depths.
    """
    return math.ceil(encoder.layers * 3 / 4)


def bertscore(
    candidates: Sequence[str],
    references: References,
    encoder: Encoder,
    layer: int | None = None,
    *,
    idf: bool = False,
    baseline: Triple | None = None,
) -> BertScore:
    """BERTScore of each candidate.

    Args:
        candidates: the texts. An empty one scores 0, and so does one whose reference is empty.
        references: one or several for each; of several the best precision, the best recall and the
            best F1 count, each by itself.
        encoder: gives the vectors. ``[CLS]`` and ``[SEP]`` weigh nothing, but may be matched with.
        layer: behind how many of its blocks; by default :func:`default_layer`.
        idf: weigh tokens by :func:`idf_weights` of all references, instead of all the same.
        baseline: what unrelated texts score; a score s becomes (s - b) / (1 - b), which spreads
            the scores and does not change their order.

    Raises:
        ValueError: as for :func:`mlx_fd.evaluation.text.as_lists`, or there is no such layer.
    """
    listed = as_lists(candidates, references)
    layer = default_layer(encoder) if layer is None else layer
    if not 0 <= layer <= encoder.layers:
        raise ValueError(f"the encoder has layers 0 to {encoder.layers}, not {layer}")
    flat = [reference.strip() for several in listed for reference in several]
    rarity = idf_weights(encoder.tokens(flat)) if idf else lambda _: 1.0
    scores: list[Triple] = []
    # Chunk by chunk, because the vectors of a long file would fill the memory.
    for begin in range(0, len(candidates), _CHUNK):
        end = begin + _CHUNK
        rows = [
            (candidate.strip(), [reference.strip() for reference in several])
            for candidate, several in zip(candidates[begin:end], listed[begin:end], strict=True)
        ]
        scores += _scores(rows, encoder, layer, rarity)
    if baseline is not None:
        scaled = (np.array(scores) - baseline) / (1 - np.array(baseline))
        scores = [Triple(*row) for row in scaled.tolist()]
    signature = "|".join(
        (
            f"encoder:{encoder.name}",
            f"weights:{encoder.fingerprint}",
            f"layer:{layer}",
            f"idf:{'yes' if idf else 'no'}",
            "rescaled:" + ("/".join(f"{b:.4f}" for b in baseline) if baseline else "no"),
        )
    )
    return BertScore(tuple(scores), signature)


def _scores(
    rows: Sequence[tuple[str, list[str]]],
    encoder: Encoder,
    layer: int,
    rarity: Callable[[int], float],
) -> list[Triple]:
    """Candidates with their references, at once."""
    texts = sorted({text for candidate, several in rows for text in (candidate, *several)})
    tokens = encoder.tokens(texts)
    sides = {
        text: (states, [0.0 if token in encoder.specials else rarity(token) for token in ids])
        for text, ids, states in zip(texts, tokens, encoder.hidden(tokens, layer), strict=True)
    }

    def pair(candidate: str, reference: str) -> Triple:
        (c, w), (r, v) = sides[candidate], sides[reference]
        return match(c, r, w, v)

    best = [np.max([pair(c, r) for r in several], axis=0) for c, several in rows]
    return [Triple(*row.tolist()) for row in best]


# ------------------------------------------------------------------------------------- baselines


def measure_baseline(
    texts: Sequence[str],
    encoder: Encoder,
    layer: int | None = None,
    pairs: int = 1000,
    seed: int = 0,
) -> Triple:
    """The mean BERTScore of texts that have nothing to do with each other, without idf.

    Args:
        texts: of different topics; the authors took sentences of Common Crawl.
        encoder: as for :func:`bertscore`.
        layer: as for :func:`bertscore`.
        pairs: how many pairs of different texts are drawn.
        seed: of the drawing.

    Raises:
        ValueError: there are fewer than two different texts.
    """
    different = sorted(set(texts))
    if len(different) < 2:
        raise ValueError("a baseline needs two different texts at least")
    rng = random.Random(seed)
    drawn = [rng.sample(different, 2) for _ in range(pairs)]
    scored = bertscore([a for a, _ in drawn], [b for _, b in drawn], encoder, layer)
    return Triple(*map(float, np.mean(scored.scores, axis=0)))


def read_baseline(path: Path, layer: int) -> Triple:
    """A layer's baseline of a file as the authors' package ships them: ``LAYER,P,R,F`` and rows.

    Raises:
        UserError: the file cannot be read, is of another form, or lacks the layer.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        by_layer = {int(row["LAYER"]): Triple(*(float(row[k]) for k in "PRF")) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a baseline, with the columns LAYER, P, R and F: {error}"
        ) from error
    if layer not in by_layer:
        raise UserError(
            f"{path} has no layer {layer}; it has {', '.join(map(str, by_layer)) or 'none'}"
        )
    return by_layer[layer]
