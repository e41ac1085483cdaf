"""Answers without gold: whose verdict on them is the expert's?

Where no right answer is known there is one judge to compare with, the expert. Its verdict is that
of its written score: above 0 an answer is good. How often it is right itself nobody knows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.baselines import Trial
from mlx_fd.evaluation.baselines.trials import trial
from mlx_fd.evaluation.bench import Bench, Uses
from mlx_fd.evaluation.cache import Rows, asked
from mlx_fd.evaluation.calibration import spearman
from mlx_fd.evaluation.judging import LABELS
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.solving import answered_by, answers_of, first_by
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import verdict_score
from mlx_fd.feedback.turns import expert_feedback, student_feedback
from mlx_fd.problems import Problem, parsing, prompts
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

_VERDICTS = {True: "good", False: "not good"}


@dataclass(frozen=True)
class Agreeing:
    """First answers to problems without gold, and whose verdicts are held against the expert's.

    Attributes:
        name: of the set.
        items: the problems.
        systems: ``student``, and ``clear``, the same before its run.
    """

    name: str
    items: Sequence[Problem]
    systems: tuple[str, ...]

    samples = 1
    shown = ("agreement", "expert_good", "score_spearman", "score_gap")

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS[system]

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Problem]
    ) -> list[Trial]:
        """One batch of feedback: the expert's, and the system's."""
        by = first_by(bench)
        begun = answers_of(bench, by, bench.first_temperature, batch, sample, chunk)
        experts = _feedback(bench, "expert", batch, chunk, begun)
        given = _feedback(bench, system, batch, chunk, begun)
        return [
            dataclasses.replace(
                one,
                turns={**expert.turns, **one.turns},
                tokens={**expert.tokens, **one.tokens},
                prefilled={**expert.prefilled, **one.prefilled},
                seconds={**expert.seconds, **one.seconds},
                by={**expert.by, **one.by},
                capped=tuple(dict.fromkeys((*expert.capped, *one.capped))),
                thoughts={**expert.thoughts, **one.thoughts},
                closed=tuple(dict.fromkeys((*expert.closed, *one.closed))),
            )
            for expert, one in zip(experts, given, strict=True)
        ]

    def row(self, problem: Problem, given: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a feedback beside the feedback itself."""
        expert = parsing.parse_feedback(given.turns["expert_feedback"]).written_score
        good = None if expert is None else expert > 0
        said = parsing.parse_feedback(given.turns["student_feedback"]).written_score
        verdict = verdict_score(said, given.score)
        own = None if verdict is None else verdict > 0
        return {
            "id": problem.id,
            "question": problem.question,
            "reference": "" if good is None else _VERDICTS[good],
            "final": None if own is None else _VERDICTS[own],
            "correct": None if good is None or own is None else own == good,
            "expert_score": expert,
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """How near a system's verdicts and scores are to the expert's, where that gave some."""
        only = [samples[0] for samples in rows]
        experts = [_number(row["expert_score"]) for row in only]
        scores = [_number(row["score"]) for row in only]
        gaps = [abs(score - expert) for score, expert in zip(scores, experts, strict=True)]
        agreed = [_number(row["correct"]) for row in only]
        good = [math.nan if math.isnan(expert) else float(expert > 0) for expert in experts]
        return [
            Measure("agreement", agreed, compared=True),
            Measure("expert_good", good),
            Measure(
                "score_spearman",
                [
                    math.nan if math.isnan(gap) else score
                    for score, gap in zip(scores, gaps, strict=True)
                ],
                spearman,
                (experts,),
            ),
            Measure("score_gap", gaps, compared=True),
        ]


def _number(value: float | bool | None) -> float:
    return math.nan if value is None else float(value)


def _feedback(
    bench: Bench, system: str, batch: int, chunk: Sequence[Problem], begun: Rows
) -> list[Trial]:
    """A judge's feedback on first answers, out of the cache or made."""
    options, who = bench.target.config.generation, first_by(bench)
    seeds = bench.seeds(batch, 0)
    by_head = system == "student" and bench.target.scores

    def make(pair: Pair) -> list[Trial]:
        answered = [answered_by(pair, *both, who) for both in zip(chunk, begun, strict=True)]
        setting = bench.setting(pair, who)
        if system == "expert":
            step = "expert_feedback"
            found = [
                (one.feedback, one.usage, one.feedback.written_score)
                for one in expert_feedback(pair, answered, options, seeds(step), bench.progress)
            ]
        else:
            step = "student_feedback"
            found = [
                (one.feedback, one.usage, one.head_score if by_head else one.feedback.written_score)
                for one in student_feedback(pair, answered, options, seeds(step), bench.progress)
            ]
        return [
            trial(
                setting,
                one.answer,
                one.usage + usage,
                {step: prompts.format_feedback(feedback)},
                step,
                score,
            )
            for one, (feedback, usage, score) in zip(answered, found, strict=True)
        ]

    uses: Uses = "expert" if system == "expert" else "untrained" if system == "clear" else "student"
    key = {
        "verdict": "student" if system == "clear" else system,
        "questions": asked(chunk),
        "answers": content_digest([row["tokens"] for row in begun]),
        "answered_by": who,
        "generation": dataclasses.asdict(dataclasses.replace(options, answers_by="expert")),
        "score_at": bench.target.config.models.score_at,
        "by_head": by_head,
        "seed": [bench.seed, batch],
    }
    return bench.trials(key, len(chunk), [uses], make)
