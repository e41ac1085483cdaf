"""Verdicts of the expert that the right answer contradicts, and what the student is taught then.

A verdict is known to be wrong where the right answer is known and the expert's written score is
above 0 on a wrong answer or below 0 on a right one. The episode goes on with the expert's first
word all the same: final answers must not get better by a right answer that nobody would have.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_fd.config import GenerationOptions
from mlx_fd.feedback.asking import OnTokens, Seeds, Turns, ask_in_step
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import ExpertFeedback, Judged
from mlx_fd.feedback.turns import write_expert_feedback
from mlx_fd.models.conversation import rewind, without_repeated_eos
from mlx_fd.problems.prompts import privileged_feedback_prompt
from mlx_fd.runs.records.episodes import ExpertFeedbackRow, VerdictRow

STEP = "privileged_feedback"

Outcome = Literal["unknown", "agrees", "kept", "left out", "asked again", "wrong again", "leaks"]
"""What became of a verdict. ``unknown``: the right answer is not, or no score could be read;
``wrong again`` and ``leaks``: left out after the expert was asked again."""

_TAUGHT: frozenset[Outcome] = frozenset({"unknown", "agrees", "kept", "asked again"})
REASONS: dict[Outcome, str] = {
    "left out": "the right answer contradicts the expert's score",
    "wrong again": "the right answer contradicts the expert's score, even when it was told it",
    "leaks": "the expert, told the right answer, says that it was told",
}

# A paragraph that says where the right answer comes from teaches what no student can know.
_TOLD = re.compile(
    r"\b(?:given|provided|reference|gold|official|known|stated|supplied)"
    r" (?:final |right |correct |true ){0,2}(?:answer|solution|result)\b"
    r"|\b(?:answer key|ground truth|right final answer)\b"
    r"|\b(?:was|were|am|been) (?:told|given) (?:that )?the (?:final |right |correct )?answer\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reviewed:
    """An episode after step 2, with its verdict held against the right answer.

    Attributes:
        judged: what the episode goes on with, the expert's first feedback in it.
        taught: the same with what the student may learn from; without feedback of the expert
            where that is nothing.
        outcome: what became of the verdict; ``None`` where the expert was not asked.
        again: the expert's feedback with the right answer in sight, where it was asked for.
    """

    judged: Judged
    taught: Judged
    outcome: Outcome | None
    again: ExpertFeedback | None = None

    def to_json(self) -> VerdictRow | None:
        """For ``episodes.jsonl``."""
        if self.outcome is None:
            return None
        again: ExpertFeedbackRow | None = None
        if self.again is not None:
            found = self.again.feedback
            again = {"text": found.text, "written_score": found.written_score}
        return {"outcome": self.outcome, "again": again}


def contradicts(score: float | None, right: bool | None) -> bool:
    """Whether a score is above 0 on a wrong answer, or below 0 on a right one.

    Args:
        score: ``None`` where it could not be read.
        right: ``None`` where it is not known.
    """
    if score is None or right is None:
        return False
    return score < 0 if right else score > 0


def says_it_was_told(text: str) -> bool:
    """Whether a feedback speaks of a right answer that was given to who wrote it."""
    return _TOLD.search(text) is not None


def write_review(
    pair: Pair, judged: Judged, how: str, options: GenerationOptions
) -> Turns[Reviewed]:
    """Hold one verdict of the expert against the right answer, as :func:`review` does."""
    found = _first_look(judged, how)
    if how != "privileged" or found.outcome != "left out":
        return found
    before = rewind(judged.conversation, len(judged.answered.conversation.tokens))
    request = feedback_request(pair.expert, privileged_feedback_prompt(judged.problem.answer))
    request = without_repeated_eos(before, request)
    asked = dataclasses.replace(judged.answered, conversation=before, request=request)
    again = yield from write_expert_feedback(pair, asked, options, STEP)
    return _second_look(judged, dataclasses.replace(again, prompt=again.prompt or asked.prompt))


def review(
    pair: Pair,
    judged: Sequence[Judged],
    how: str,
    options: GenerationOptions,
    seeds: Seeds,
    on_tokens: OnTokens,
) -> list[Reviewed]:
    """Hold the expert's verdicts against the right answers, and see to the wrong ones.

    Args:
        pair: the models; the expert is asked again where ``how`` says so.
        judged: episodes after step 2.
        how: ``expert_verdicts``: ``checked``, ``privileged`` or ``as-is``.
        options: token limits and sampling.
        seeds: step name to the seed of its draws.
        on_tokens: called for every token.

    Returns:
        One for each, in order.
    """
    works = [write_review(pair, one, how, options) for one in judged]
    return ask_in_step(works, seeds, on_tokens)


def _first_look(judged: Judged, how: str) -> Reviewed:
    if judged.expert is None:
        return Reviewed(judged, judged, None)
    score, right = judged.expert.feedback.written_score, judged.answered.is_correct
    if score is None or right is None:
        return Reviewed(judged, judged, "unknown")
    if not contradicts(score, right):
        return Reviewed(judged, judged, "agrees")
    if how == "as-is":
        return Reviewed(judged, judged, "kept")
    return Reviewed(judged, dataclasses.replace(judged, expert=None), "left out")


def _second_look(judged: Judged, again: ExpertFeedback) -> Reviewed:
    """What is taught where the expert was asked again."""
    assert judged.expert is not None
    asked = dataclasses.replace(judged.expert, usage=judged.expert.usage + again.usage)
    score = again.feedback.written_score
    outcome: Outcome = "asked again"
    if score is None or contradicts(score, judged.answered.is_correct):
        outcome = "wrong again"
    elif says_it_was_told(again.feedback.text):
        outcome = "leaks"
    return Reviewed(
        dataclasses.replace(judged, expert=asked),
        dataclasses.replace(judged, expert=again if outcome in _TAUGHT else None),
        outcome,
        again,
    )


def tally(outcomes: Sequence[Outcome | None]) -> dict[str, int]:
    """How many verdicts of a batch had each outcome; those that had one."""
    counts = Counter(one for one in outcomes if one is not None)
    return dict(sorted(counts.items()))
