"""A set of answers whose first error is known: who finds it, and whose scores are right?

The questions are those of the examination (:mod:`mlx_fd.evaluation.exam`), on generated problems.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_fd.evaluation.baselines import SYSTEMS, Trial
from mlx_fd.evaluation.baselines.critics import criticise
from mlx_fd.evaluation.baselines.trials import trial
from mlx_fd.evaluation.bench import Bench, Uses, outside_code
from mlx_fd.evaluation.cache import asked
from mlx_fd.evaluation.calibration import brier, pr_auc, roc_auc, spearman
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.processbench import f1
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import Answered, ExpertFeedback, StudentFeedback
from mlx_fd.feedback.turns import expert_feedback, student_feedback
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import said
from mlx_fd.problems import arithmetic, parsing, prompts
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.sources import Question
from mlx_fd.runs.records.evaluation import ItemRow, OutputRow

LABELS = {
    "student": "Student",
    "clear": "Untrained student",
    "expert": "Expert",
}
"""What judges are called that are called otherwise where they solve."""
FEEDBACK = "feedback"


@dataclass(frozen=True)
class Judging:
    """Answers to judge, and who judges them.

    Attributes:
        name: of the set.
        items: the answers, with the truth about each.
        systems: ``student``, ``clear``, ``expert`` and critics, the one that is compared first.
    """

    name: str
    items: Sequence[Question]
    systems: tuple[str, ...]

    samples = 1
    shown = (
        "first_error_f1",
        "first_error_on_wrong",
        "first_error_on_right",
        "score_roc_auc",
    )

    def label(self, system: str) -> str:
        """What a table calls a system."""
        return LABELS.get(system, SYSTEMS[system].label)

    def attempt(
        self, bench: Bench, system: str, batch: int, sample: int, chunk: Sequence[Question]
    ) -> list[Trial]:
        """One batch of feedback."""
        options = bench.target.config.generation
        seeds = bench.seeds(batch, sample)
        by_head = system == "student" and bench.target.scores

        def make(pair: Pair) -> list[Trial]:
            answered = [_answered(pair, question) for question in chunk]
            setting = bench.setting(pair, "expert")
            if (stages_of := SYSTEMS[system].stages) is not None:
                stages = stages_of(pair.expert)
                judged = criticise(setting, answered, stages, seeds, bench.progress)
                return [
                    trial(
                        setting,
                        item.answered.answer,
                        item.usage,
                        {**item.turns, FEEDBACK: prompts.format_feedback(item.feedback)},
                        FEEDBACK,
                        item.feedback.written_score,
                    )
                    for item in judged
                ]
            if system == "expert":
                step = "expert_feedback"
                experts = expert_feedback(pair, answered, options, seeds(step), bench.progress)
                given: list[tuple[ExpertFeedback | StudentFeedback, float | None]] = [
                    (one, one.feedback.written_score) for one in experts
                ]
            else:
                step = "student_feedback"
                students = student_feedback(pair, answered, options, seeds(step), bench.progress)
                given = [
                    (one, one.head_score if by_head else one.feedback.written_score)
                    for one in students
                ]
            return [
                trial(
                    setting,
                    one.answer,
                    one.usage + found.usage,
                    {step: prompts.format_feedback(found.feedback)},
                    step,
                    score,
                )
                for one, (found, score) in zip(answered, given, strict=True)
            ]

        uses: Uses = "expert"
        if system in ("student", "clear"):
            uses = "student" if system == "student" else "untrained"
        key = {
            "judge": "student" if system == "clear" else system,
            "questions": asked(question.problem for question in chunk),
            "answers": [question.answer for question in chunk],
            "generation": dataclasses.asdict(dataclasses.replace(options, answers_by="expert")),
            "score_at": bench.target.config.models.score_at,
            "by_head": by_head,
            "seed": [bench.seed, batch, sample],
            **outside_code(system),
        }
        return bench.trials(key, len(chunk), [uses], make)

    def row(self, question: Question, given: Trial, how: str) -> ItemRow:
        """What ``outputs.jsonl`` says of a feedback beside the feedback itself."""
        feedback = parsing.parse_feedback(given.final)
        named = arithmetic.first_error(feedback.text)
        return {
            "id": question.problem.id,
            "question": question.problem.question,
            "reference": str(question.first_error),
            "final": None if named is None else str(named),
            "correct": named == question.first_error,
            "deserved": question.score,
            "written_score": feedback.written_score,
        }

    def measures(self, rows: Sequence[Sequence[OutputRow]]) -> list[Measure]:
        """What a system got: the examination's measures, and how good its scores are."""
        only = [samples[0] for samples in rows]
        hits = [float(bool(row["correct"])) for row in only]
        wrong = [float(row["reference"] != "0") for row in only]
        right = [1 - value for value in wrong]
        scores = [math.nan if row["score"] is None else row["score"] for row in only]
        deserved = [row["deserved"] for row in only]
        chances = [(score + 1) / 2 for score in scores]
        return [
            Measure("first_error_f1", hits, f1, (wrong,), compared=True),
            Measure("first_error_on_wrong", _where(wrong, hits)),
            Measure("first_error_on_right", _where(right, hits)),
            Measure(
                "readable",
                [
                    float(row["written_score"] is not None and row["final"] is not None)
                    for row in only
                ],
            ),
            Measure(
                "score_error",
                [abs(score - truth) for score, truth in zip(scores, deserved, strict=True)],
                compared=True,
            ),
            Measure("score_spearman", scores, spearman, (deserved,)),
            Measure("score_roc_auc", scores, roc_auc, (right,)),
            Measure("score_pr_auc", scores, pr_auc, (right,)),
            Measure("score_brier", chances, brier, (right,)),
        ]


def _where(mask: Sequence[float], values: Sequence[float]) -> list[float]:
    return [value if kept else math.nan for kept, value in zip(mask, values, strict=True)]


def _answered(pair: Pair, question: Question) -> Answered:
    """An answer as if the expert had given it."""
    expert = pair.expert
    reply = tuple(expert.tokenizer.encode(question.answer, add_special_tokens=False))
    prompt = prompts.answer_prompt(question.problem.question, form_of(question.problem))
    chat = said(expert, prompt, reply)
    return Answered(
        question.problem,
        prompts.Answer(question.answer, None, reply),
        Conversation(chat),
        feedback_request(expert),
    )
