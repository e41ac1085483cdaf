"""Best of N: several answers to each problem, and who picks one of them.

The student judges each answer, with its score head and in writing; the pick by either score is held
against the majority's (Maj@N), a random one (Avg@N), and the share of problems with a right answer
among the N at all (Pass@N), which no pick can beat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import Who, trial
from mlx_fd.evaluation.bench import Bench, Uses
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.sampling import WARM, best_of, maj_at_k, pass_at_k
from mlx_fd.evaluation.solving import answered_by, answers_of, first_by, with_shots
from mlx_fd.feedback.episode import student_feedback
from mlx_fd.feedback.pair import Pair
from mlx_fd.problems import Problem, parsing, prompts
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records import ItemRow, OutputRow

HEAD, WRITTEN, MAJORITY, RANDOM = "head", "written", "majority", "random"
_LABELS = {
    HEAD: "Pick by the student's score head",
    WRITTEN: "Pick by the student's written score",
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
        return ("accuracy", f"pass@{self.samples}")

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
        judged = system in (HEAD, WRITTEN)

        def answered(pair: Pair) -> list[Trial]:
            setting = bench.setting(pair, by)
            read = [answered_by(pair, *both, by) for both in zip(chunk, begun, strict=True)]
            if not judged:
                return [trial(setting, one.answer, one.usage, {}) for one in read]
            options = bench.target.config.generation
            seed = bench.seeds(batch, sample)(_STEP)
            given = student_feedback(pair, read, options, seed, bench.progress)
            return [
                trial(
                    setting,
                    one.answer,
                    one.usage + found.usage,
                    {_STEP: prompts.format_feedback(found.feedback)},
                    score=found.head_score,
                )
                for one, found in zip(read, given, strict=True)
            ]

        uses: list[Uses] = [by, "student"] if judged else [by]
        options = bench.target.config.generation
        key = {
            "best_of": _STEP if judged else None,
            "questions": [problem.question for problem in chunk],
            "answers": content_digest([row["tokens"] for row in begun]),
            "answered_by": by,
            "generation": dataclasses.asdict(
                dataclasses.replace(options, answers_by="expert", answer_filter="auto")
            ),
            "score_at": bench.target.config.models.score_at,
            "seed": [bench.seed, batch, sample],
        }
        return bench.trials(key, len(chunk), list(dict.fromkeys(uses)), answered)

    def row(self, problem: Problem, given: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of an answer beside the answer itself."""
        final = read_final(given.turns["answer"], problem, how)
        feedback = parsing.parse_feedback(given.turns.get(_STEP, ""))
        return {
            "id": problem.id,
            "question": problem.question,
            "reference": problem.answer,
            "final": final,
            "correct": is_right(final, problem),
            "written_score": feedback.written_score,
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """How often a way to pick finds a right answer."""
        pick = _PICKS[rows[0][0]["system"]] if rows else _random
        right = [sum(bool(row["correct"]) for row in samples) for samples in rows]
        k = self.samples
        return [
            Measure("accuracy", [pick(samples) for samples in rows], compared=True),
            Measure(f"pass@{k}", [pass_at_k(count, k, k) for count in right]),
        ]


def _right(samples: Sequence[OutputRow]) -> list[bool]:
    return [bool(row["correct"]) for row in samples]


def _by_head(samples: Sequence[OutputRow]) -> float:
    return best_of([row["score"] for row in samples], _right(samples))


def _by_written(samples: Sequence[OutputRow]) -> float:
    return best_of([row["written_score"] for row in samples], _right(samples))


def _by_majority(samples: Sequence[OutputRow]) -> float:
    right = {row["final"] for row in samples if row["correct"]}
    return maj_at_k([row["final"] for row in samples], right.__contains__)


def _random(samples: Sequence[OutputRow]) -> float:
    return float(np.mean(_right(samples)))


_PICKS: dict[str, Callable[[Sequence[OutputRow]], float]] = {
    HEAD: _by_head,
    WRITTEN: _by_written,
    MAJORITY: _by_majority,
    RANDOM: _random,
}
