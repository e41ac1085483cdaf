"""What student and expert make of held-out problems, and what the student's answers are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mlx_fd.config import GenerationOptions
from mlx_fd.errors import UserError
from mlx_fd.evaluation.bench import Bench
from mlx_fd.evaluation.cache import Rows, asked
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import HEAD, Score, answer_score
from mlx_fd.feedback.asking import generate_step
from mlx_fd.feedback.judge import Judge, locate_model
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.turns import read_answer
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import GenerateOptions, Turn, sampling_for
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import form_of, is_right
from mlx_fd.problems.prompts import answer_prompt

STUDENT, EXPERT = "student", "expert"


def outcomes(
    bench: Bench,
    problems: Sequence[Problem],
    score: Score,
    on_progress: Callable[[str, int, int], None],
) -> list[Outcome]:
    """Let both answer every problem, greedily, and score the student's answers.

    Args:
        bench: of a run, with an expert; what it generated before is not made again.
        problems: held out from the training.
        score: what the student's answers are scored by.
        on_progress: called with a step, the problems done, and their number.

    Raises:
        UserError: there is no expert, or no trained head for its score.
    """
    target = bench.target
    if target.expert is None:
        raise UserError(
            f"{target.name}: a cascade needs an expert to pass on to; add --expert NAME"
        )
    if score is HEAD and not target.scores:
        raise UserError(
            f"{target.name}: --score head needs a trained score head, which a run of mlx-fd loop "
            "with the loss score has; take --score answer"
        )
    done: dict[str, list[Rows]] = {STUDENT: [], EXPERT: []}
    for who, rows in done.items():
        count = 0
        for _, chunk in bench.batches(problems):
            rows.append(_rows(bench, who, chunk, score))
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


def _rows(bench: Bench, who: str, chunk: Sequence[Problem], score: Score) -> Rows:
    target = bench.target
    # As the server writes, where a request does not ask for a penalty.
    options = dataclasses.replace(target.config.generation, expert_repetition_penalty=1.0)
    key = {
        "cascade": who,
        "questions": asked(chunk),
        "answers": [[p.answer, p.kind, list(p.choices), list(p.also_right)] for p in chunk],
        "max_tokens": options.max_answer_tokens,
        "feedback_tokens": options.max_feedback_tokens,
        "filter": options.answer_filter,
        "score_at": target.config.models.score_at,
        "score": score.name if who == STUDENT else None,
    }

    def make(pair: Pair) -> Rows:
        loaded = pair.student_lm if who == STUDENT else pair.expert
        prompts = [first_prompt(loaded, answer_prompt(p.question, form_of(p))) for p in chunk]
        turns = _answers(bench, loaded, prompts, options)
        found = [
            read_answer(turn, problem, options).final
            for turn, problem in zip(turns, chunk, strict=True)
        ]
        rows: Rows = [
            {"right": is_right(final, problem), "tokens": turn.written}
            for final, problem, turn in zip(found, chunk, turns, strict=True)
        ]
        if who == EXPERT:
            return rows
        if score is HEAD:
            scores = _head_scores(pair, target.name, prompts, turns, options.max_feedback_tokens)
        else:
            scores = [answer_score(turn.logprobs, finished=turn.finished) for turn in turns]
        return [{**row, "score": value} for row, value in zip(rows, scores, strict=True)]

    uses: Any = who
    return bench.rows(key, len(chunk), [uses], make)


def _answers(
    bench: Bench,
    loaded: Loaded,
    prompts: Sequence[tuple[int, ...]],
    options: GenerationOptions,
) -> list[Turn]:
    """Greedy answers, with the log-probabilities of their tokens."""
    turns, _ = generate_step(
        loaded,
        "answer",
        [Conversation()] * len(prompts),
        prompts,
        dataclasses.replace(sampling_for(options, "answer", 0), temperature=0.0),
        bench.progress,
        GenerateOptions(reuse=not options.sequential, keep=False, logprobs=True),
    )
    return turns


def _head_scores(
    pair: Pair,
    name: str,
    prompts: Sequence[tuple[int, ...]],
    turns: Sequence[Turn],
    max_tokens: int,
) -> list[float]:
    judge = Judge(locate_model(name), pair.student_lm, pair.student)
    requests = [
        judge.own_request(prompt, turn.tokens) for prompt, turn in zip(prompts, turns, strict=True)
    ]
    return judge.scores(requests, max_tokens)
