"""How near texts are to references, by their words and characters: ROUGE, BLEU, chrF.

The numbers are those of the packages that papers use: rouge-score and sacrebleu.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from mlx_fd.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

# One reference for each prediction, or several.
References = Sequence[str] | Sequence[Sequence[str]]

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
_ROUGE_WORD = re.compile(r"[a-zA-Z0-9]")
_DIGITS = 9


@dataclass(frozen=True)
class CorpusScore:
    """A number that belongs to all texts together, not to each.

    Attributes:
        estimate: from 0 to 100, its 95 % interval and the number of texts.
        signature: sacrebleu's: what exactly was computed. A number without it says little.
    """

    estimate: Estimate
    signature: str


def as_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    """The references of each prediction.

    Raises:
        ValueError: there is no prediction, or not a reference for each.
    """
    listed = [[each] if isinstance(each, str) else list(each) for each in references]
    if not predictions or len(listed) != len(predictions) or not all(listed):
        raise ValueError("there must be predictions, and at least one reference for each")
    return listed


def rouge(predictions: Sequence[str], references: References) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each prediction (Lin, 2004), as F1 of precision and recall.

    Words are lower-cased runs of a-z and 0-9 reduced to their Porter stem, so there is no ROUGE of
    other scripts: a prediction without a reference that has such a word has NaN. ROUGE-L takes the
    longest common subsequence of the whole text.

    Args:
        predictions: the texts.
        references: one or several for each; of several the best F1 counts.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``, each with a value in [0, 1] per prediction, or NaN.

    Raises:
        ValueError: as for :func:`as_lists`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    listed = as_lists(predictions, references)
    scored = [
        scorer.score_multi(right, text) if any(map(_ROUGE_WORD.search, right)) else None
        for text, right in zip(predictions, listed, strict=True)
    ]
    return {
        kind: [math.nan if one is None else float(one[kind].fmeasure) for one in scored]
        for kind in ROUGE_TYPES
    }


def bleu(predictions: Sequence[str], references: References) -> CorpusScore:
    """Corpus BLEU (Papineni et al., 2002) as sacrebleu has it: 13a tokens, cased, exp smoothing.

    The interval is sacrebleu's: 1,000 bootstrap resamples of the texts, a fixed seed. NLTK's
    sentence BLEU on whitespace tokens is another number.

    Args:
        predictions: the texts.
        references: one or several for each.

    Raises:
        ValueError: as for :func:`as_lists`.
    """
    from sacrebleu.metrics.bleu import BLEU

    # force: no advice on tokenised text; a model may end a line with " ." as often as it likes.
    return _corpus(BLEU(force=True), predictions, references)


def chrf(predictions: Sequence[str], references: References) -> CorpusScore:
    """Corpus chrF2 (Popović, 2015): F2 of character n-grams up to 6, as sacrebleu has it.

    It reads every script. The interval is as for :func:`bleu`.

    Args:
        predictions: the texts.
        references: one or several for each.

    Raises:
        ValueError: as for :func:`as_lists`.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _corpus(CHRF(), predictions, references)


def _corpus(metric: Metric, predictions: Sequence[str], references: References) -> CorpusScore:
    # sacrebleu wants the first reference of every text, then the second of every text that has one.
    streams = [list(stream) for stream in zip_longest(*as_lists(predictions, references))]
    scored = metric.corpus_score(list(predictions), streams, n_bootstrap=1000)
    signature = str(metric.get_signature())
    report = json.loads(scored.format(width=_DIGITS, signature=signature, is_json=True))
    middle, half = report.get("confidence_mean", 0.0), report.get("confidence_var", 0.0)
    # Resamples that are all alike, as those of one text, say nothing of how far it may be off.
    half = half or math.nan
    estimate = Estimate(float(scored.score), middle - half, middle + half, len(predictions))
    return CorpusScore(estimate, signature)
