"""What student and expert make of held-out problems, and the student's score of its own answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cache import Rows
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.feedback.episode import Answered, answer
from mlx_fd.feedback.judge import Judge, locate_model
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.generation import first_prompt
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.prompts import answer_prompt


def outcomes(
    bench: Bench, problems: Sequence[Problem], on_progress: Callable[[str, int, int], None]
) -> list[Outcome]:
    """Let both answer every problem, greedily, and the student judge its answers.

    Args:
        bench: of a run of the loop, with an expert; what it generated before is not made again.
        problems: held out from the training.
        on_progress: called with a step, the problems done, and their number.

    Raises:
        UserError: the student has no trained score head, or there is no expert.
    """
    target = bench.target
    if not target.helps_expert or target.expert is None:
        raise UserError(
            f"{target.name}: a cascade needs a student with a trained score head and an expert; "
            "name a run of mlx-fd loop"
        )
    done: dict[str, list[Rows]] = {"student": [], "expert": []}
    for who, rows in done.items():
        count = 0
        for _, chunk in bench.batches(problems):
            rows.append(_rows(bench, who, chunk))
            count += len(chunk)
            on_progress(f"the {who} answers", count, len(problems))
    students, experts = ([row for part in parts for row in part] for parts in done.values())
    return [
        Outcome(
            problem.id,
            student["score"],
            student["right"],
            expert["right"],
            student["tokens"],
            expert["tokens"],
        )
        for problem, student, expert in zip(problems, students, experts, strict=True)
    ]


def _rows(bench: Bench, who: str, chunk: Sequence[Problem]) -> Rows:
    target = bench.target
    # As the server writes, where a request does not ask for a penalty.
    options = dataclasses.replace(target.config.generation, expert_repetition_penalty=1.0)
    key = {
        "cascade": who,
        "questions": [problem.question for problem in chunk],
        "answers": [[p.answer, p.kind, list(p.choices), list(p.also_right)] for p in chunk],
        "max_tokens": options.max_answer_tokens,
        "feedback_tokens": options.max_feedback_tokens,
        "filter": options.answer_filter,
        "score_at": target.config.models.score_at,
    }

    def make(pair: Pair) -> Rows:
        loaded = pair.student_lm if who == "student" else pair.expert
        answered = answer(loaded, chunk, options, 0, bench.progress, temperature=0.0, keep=False)
        rows: Rows = [
            {"right": one.is_correct, "tokens": one.usage.tokens["answer"]} for one in answered
        ]
        if who == "student":
            scores = _scores(pair, target.name, answered, options.max_feedback_tokens)
            rows = [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]
        return rows

    uses: Any = who
    return bench.rows(key, len(chunk), [uses], make)


def _scores(pair: Pair, name: str, answered: Sequence[Answered], max_tokens: int) -> list[float]:
    loaded = pair.student_lm
    judge = Judge(locate_model(name), loaded, pair.student)
    prompts = [
        judge.own_request(
            first_prompt(loaded, answer_prompt(one.problem.question, form_of(one.problem))),
            one.answer.tokens,
        )
        for one in answered
    ]
    return judge.scores(prompts, max_tokens)
