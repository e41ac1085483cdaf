"""What the student's two scores are worth as a verdict on an answer, held against the expert's.

They are of episodes before the student learned from them: of answers that it was not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlx_fd.evaluation.calibration import brier, roc_auc
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.statistics import Estimate
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.summary import CalibrationBinRow, JudgingRow, ReliabilityRow

BINS = 10


def judging(episodes: Sequence[EpisodeRow]) -> JudgingRow | None:
    """Both of the student's scores in the second half of the episodes that the expert scored.

    Args:
        episodes: rows of ``episodes.jsonl``.

    Returns:
        ``None`` where the expert scored no answer.
    """
    verdicts, heads, written = [], [], []
    for row in episodes:
        expert = row["expert_feedback"]
        if expert is None or expert["written_score"] is None:
            continue
        verdicts.append(expert["written_score"] > 0)
        heads.append(row["student_feedback"]["head_score"])
        written.append(row["student_feedback"]["written_score"])
    half = len(verdicts) // 2
    if not verdicts:
        return None
    return {
        "head": reliability(heads[half:], verdicts[half:]),
        "written": reliability(written[half:], verdicts[half:]),
    }


def reliability(scores: Sequence[float | None], positive: Sequence[bool]) -> ReliabilityRow:
    """A score s in [-1, 1], read as the probability (1 + s) / 2 that the answer is right.

    Args:
        scores: of each answer; ``None`` where there is none, which is left out.
        positive: whether the expert called it right.

    Returns:
        Brier score and area under the ROC curve with 95 % intervals over the answers
        (:meth:`mlx_fd.evaluation.measures.Measure.estimate`), and the calibration curve in bins of
        equal width.
    """
    known = [(s, ok) for s, ok in zip(scores, positive, strict=True) if s is not None]
    probabilities = np.array([(1 + s) / 2 for s, _ in known])
    right = np.array([ok for _, ok in known], dtype=bool)
    # A score of -0.8 is 0.1, of which rounding leaves a hair less.
    bins = np.minimum(np.round(probabilities * BINS, 9).astype(int), BINS - 1)
    curve: list[CalibrationBinRow] = [
        {
            "low": place / BINS,
            "high": (place + 1) / BINS,
            "n": int(inside.sum()),
            "probability": round(float(probabilities[inside].mean()), 4),
            "right": round(float(right[inside].mean()), 4),
        }
        for place in range(BINS)
        if (inside := bins == place).any()
    ]
    truth = right.astype(np.float64).tolist()
    score, area = (
        Measure(statistic.__name__, probabilities.tolist(), statistic, (truth,)).estimate()
        for statistic in (brier, roc_auc)
    )
    return {
        "n": len(known),
        "brier": _rounded(score.value),
        "brier_interval": _interval(score),
        "auc": _rounded(area.value),
        "auc_interval": _interval(area),
        "curve": curve,
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _interval(of: Estimate) -> list[float] | None:
    """``None`` where the number, or its interval, is not known."""
    ends = (of.value, of.low, of.high)
    return None if any(map(math.isnan, ends)) else [round(of.low, 4), round(of.high, 4)]
