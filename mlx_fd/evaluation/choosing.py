"""Best of N: several answers to each problem, and who picks one of them.

The student judges each answer: with its score head, in writing, and by its written verdict with the
probability of the text that it stands in. The pick by each of these scores is held against the
majority's (Maj@N), a random one (Avg@N), and the share of problems that have a right answer among
the N at all (Pass@N), which no pick can beat.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import Who, trial
from mlx_fd.evaluation.bench import Bench, Uses
from mlx_fd.evaluation.cache import Rows, asked
from mlx_fd.evaluation.calibration import roc_auc
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.sampling import WARM, best_of, pass_at_k
from mlx_fd.evaluation.solving import answered_by, answers_of, first_by, majority, with_shots
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import StudentFeedback
from mlx_fd.feedback.turns import student_feedback
from mlx_fd.problems import Problem, prompts
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

HEAD, SURE, WRITTEN = "head", "sure", "written"
MAJORITY, RANDOM = "majority", "random"
_LABELS = {
    HEAD: "Pick by the student's score head",
    SURE: "Pick by its verdict, and how sure it is",
    WRITTEN: "Pick by its written score",
    MAJORITY: "Majority of the answers",
    RANDOM: "An answer at random",
}
_STEP = "student_feedback"


@dataclass(frozen=True)
class Choosing:
    """Problems with N answers each, and ways to pick one.

    Attributes:
        name: of the set.
        items: the problems.
        systems: the ways; ``head`` first, where the student has a trained head.
        samples: N.
        shots: what stands before each question.
    """

    name: str
    items: Sequence[Problem]
    systems: tuple[str, ...]
    samples: int
    shots: str = ""

    @property
    def shown(self) -> tuple[str, ...]:
        """Measures for the terminal's table."""
        return ("accuracy", f"pass@{self.samples}", "score_roc_auc")

    def label(self, system: str) -> str:
        """What a table calls a way to pick."""
        return _LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Problem]
    ) -> list[Trial]:
        """One answer to each problem of a batch, and what the student makes of it."""
        chunk = with_shots(chunk, self.shots)
        by: Who = first_by(bench)
        begun = answers_of(bench, by, bench.first_temperature or WARM, batch, sample, chunk)
        judged, config = system in SCORES, bench.target.config

        def make(pair: Pair) -> Rows:
            setting = bench.setting(pair, by)
            read = [answered_by(pair, *both, by) for both in zip(chunk, begun, strict=True)]
            if not judged:
                return [_row(trial(setting, one.answer, one.usage, {})) for one in read]
            seed = bench.seeds(batch, sample)(_STEP)
            given = student_feedback(pair, read, config.generation, seed, bench.progress)
            return [
                _row(
                    trial(
                        setting,
                        one.answer,
                        one.usage + found.usage,
                        {_STEP: prompts.format_feedback(found.feedback)},
                    ),
                    {name: of(found) for name, of in SCORES.items()},
                )
                for one, found in zip(read, given, strict=True)
            ]

        uses: tuple[Uses, ...] = (by, "student") if judged else (by,)
        key = {
            "best_of": _STEP if judged else None,
            "questions": asked(chunk),
            "answers": content_digest([row["tokens"] for row in begun]),
            "answered_by": by,
            "generation": dataclasses.asdict(
                dataclasses.replace(config.generation, answers_by="expert", answer_filter="auto")
            ),
            "score_at": config.models.score_at,
            "seed": [bench.seed, batch, sample],
        }
        rows = bench.rows(key, len(chunk), list(dict.fromkeys(uses)), make)
        return [
            dataclasses.replace(Trial.from_json(row["trial"]), score=row["scores"].get(system))
            for row in rows
        ]

    def row(self, problem: Problem, given: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of an answer beside the answer itself."""
        final = read_final(given.turns["answer"], problem, how)
        return {
            "id": problem.id,
            "question": problem.question,
            "reference": problem.answer,
            "final": final,
            "correct": is_right(final, problem),
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """How often a way to pick finds a right answer."""
        right = [sum(bool(row["correct"]) for row in samples) for samples in rows]
        picked = list(map(_pick, self.items, rows))
        k = self.samples
        found = [
            Measure("accuracy", picked, compared=True),
            Measure(f"pass@{k}", [pass_at_k(count, k, k) for count in right]),
        ]
        # How well a score tells right answers from wrong ones; one answer to each problem.
        firsts = [samples[0] for samples in rows]
        scores = [math.nan if row["score"] is None else row["score"] for row in firsts]
        if not all(map(math.isnan, scores)):
            positive = [float(bool(row["correct"])) for row in firsts]
            found.append(Measure("score_roc_auc", scores, roc_auc, (positive,)))
        return found


def _row(given: Trial, scores: Mapping[str, float | None] | None = None) -> dict[str, Any]:
    return {"trial": dict(given.to_json()), "scores": dict(scores or {})}


def _sure(given: StudentFeedback) -> float | None:
    """The written verdict's sign, times 1 / (1 - log p) of the text that it stands in."""
    written = given.feedback.written_score
    if written is None:
        return None
    return (1 if written > 0 else -1) / (1 - given.logprob)


SCORES: dict[str, Callable[[StudentFeedback], float | None]] = {
    HEAD: lambda given: given.head_score,
    SURE: _sure,
    WRITTEN: lambda given: given.feedback.written_score,
}
"""What an answer can be picked by, the highest first."""


def _random(samples: Sequence[OutputRow]) -> float:
    return float(np.mean([bool(row["correct"]) for row in samples]))


def _by_score(samples: Sequence[OutputRow]) -> float:
    return best_of([row["score"] for row in samples], [bool(row["correct"]) for row in samples])


def _pick(problem: Problem, samples: Sequence[OutputRow]) -> float:
    """The probability that a way to pick finds a right answer."""
    system = samples[0]["system"]
    if system in SCORES:
        return _by_score(samples)
    return majority(problem, samples) if system == MAJORITY else _random(samples)
