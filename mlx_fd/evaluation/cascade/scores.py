"""What a student's answer is scored by: its own probability of it, or its score head's verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A number that says how far an answer can be relied on; the higher, the farther.

    Attributes:
        name: as options and files have it.
        help: what it is.
        lowest: its least value; its largest is 1.
    """

    name: str
    help: str
    lowest: float

    def of_share(self, share: float) -> float:
        """A share of its range, in [0, 1], as a score."""
        return self.lowest + share * (1 - self.lowest)

    def share(self, score: float) -> float:
        """A score as a share of its range."""
        return (score - self.lowest) / (1 - self.lowest)


ANSWER = Score("answer", "how probable the student's answer was to itself", 0.0)
HEAD = Score("head", "the score head's score of that answer", -1.0)
SCORES = {score.name: score for score in (ANSWER, HEAD)}


def answer_score(logprobs: Sequence[float], *, finished: bool) -> float:
    """1 / (1 - log p) of an answer, as the loop's trust has it of a feedback's text.

    It rises with p, and leaves room between long answers, whose p are all almost 0.

    Args:
        logprobs: log-probabilities of the answer's tokens, as they were drawn.
        finished: whether the student ended it. What was cut off is no answer: its score is 0.

    Returns:
        In [0, 1].
    """
    return 1 / (1 - min(sum(logprobs), 0.0)) if finished else ANSWER.lowest
