"""Models that read what systems wrote: an encoder, and a classifier of toxic texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.bertscore import bertscore
from mlx_fd.evaluation.encoder import Encoder, load_encoder
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.toxicity import Judge, load_judge
from mlx_fd.runs.records.evaluation import OutputRow

WORDS = "words"


@dataclass(frozen=True)
class Readers:
    """What was asked for; without either there are no such measures.

    Attributes:
        encoder: for BERTScore and cosines.
        judge: for toxicity.
    """

    encoder: Encoder | None = None
    judge: Judge | None = None

    def about(self) -> dict[str, str]:
        """Which models ran; numbers of others are not comparable."""
        signatures = {}
        if self.encoder is not None:
            signatures["encoder"] = bertscore(["."], ["."], self.encoder).signature
        if self.judge is not None:
            nothing = self.judge([])
            signatures["toxicity"] = f"{nothing.judge}: {nothing.measures}"
        return signatures

    def nearness(self, candidates: Sequence[str], wanted: Sequence[str]) -> list[Measure]:
        """How near texts are to their references."""
        if self.encoder is None:
            return []
        scores = bertscore(candidates, wanted, self.encoder).scores
        return [
            Measure("bertscore_f1", [score.f1 for score in scores], compared=True),
            Measure("cosine", self.encoder.cosine(candidates, wanted)),
        ]

    def toxicity(self, texts: Sequence[str]) -> list[Measure]:
        """The classifier's probability for each text."""
        return [] if self.judge is None else [Measure("toxicity", self.judge(texts).values)]

    def likeness(self, rows: Sequence[OutputRow]) -> list[Measure]:
        """How alike expert's and student's feedback are, where both were given."""
        if self.encoder is None:
            return []
        both = [
            (row["turns"]["expert_feedback"], row["turns"]["student_feedback"])
            if {"expert_feedback", "student_feedback"} <= set(row["turns"])
            else None
            for row in rows
        ]
        if not any(both):
            return []
        pairs = [pair for pair in both if pair]
        alike = iter(self.encoder.cosine(*map(list, zip(*pairs, strict=True))))
        values = [next(alike) if pair else math.nan for pair in both]
        return [Measure("feedback_cosine", values)]


def load_readers(encoder: str | None, toxicity: str | None) -> Readers:
    """The models by their names; ``None``: none, ``words``: the small classifier of the extra.

    Raises:
        UserError: there is no such model, or an extra is not installed.
    """
    judge = None
    if toxicity is not None:
        judge = load_judge(None if toxicity == WORDS else toxicity)
    return Readers(None if encoder is None else load_encoder(encoder), judge)
