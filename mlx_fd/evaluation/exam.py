"""An examination of the student where the truth is known: before a run, and after it.

The questions are answers to problems of which all is known, half of them with one error. The
student gives its feedback on each, and solves the problem itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fd.config import Config, GenerationOptions
from mlx_fd.errors import UserError
from mlx_fd.evaluation import processbench
from mlx_fd.evaluation.processbench import f1
from mlx_fd.evaluation.statistics import Rows, bootstrap, mean, mean_gain
from mlx_fd.feedback.episode import (
    Progress,
    answer,
    feedback_request,
    head_score,
    is_correct,
    parsed,
)
from mlx_fd.feedback.pair import Pair
from mlx_fd.files import write_json
from mlx_fd.models.generation import Conversation, Sampling, first_prompt, generate, prefill
from mlx_fd.problems import arithmetic, parsing
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.problems.sources import Question, names_with_truth, truth_of
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest


@dataclass(frozen=True)
class Result:
    """What the student made of one question.

    Attributes:
        wrong: whether the answer had an error.
        score_error: |score head - truth|.
        written_error: |written score - truth|; a score that cannot be read counts as 0.
        readable: whether a score and a verdict on the steps could be read in its feedback.
        found: whether the first wrong step it names (or that it names none) is the truth;
            ProcessBench's definition (arXiv 2412.06559), where what cannot be read is not found.
        solved: whether its own solution of the problem is right.
    """

    wrong: bool
    score_error: float
    written_error: float
    readable: bool
    found: bool
    solved: bool


_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Result)}


def questions(
    size: int, seed: int, split: str = "test", source: str = "arithmetic"
) -> tuple[Question, ...]:
    """Draw an examination: ``size`` problems of a held-out split, every second answer wrong.

    Raises:
        UserError: nothing is known of answers to the source's problems.
    """
    truth = truth_of(source)
    if truth is None:
        raise UserError(
            f"{source}: the truth about answers is not known; use --problems {names_with_truth()}"
        )
    return truth.questions(size, seed, split)


def processbench_items(exam: Sequence[Question]) -> tuple[processbench.Item, ...]:
    """The questions in ProcessBench's form: a step for each line of the answer.

    The line with the final number is the last step, and the one with the error where that number
    is wrong, or where a step is missing before it.
    """
    return tuple(
        processbench.Item(
            question.problem.id,
            "mlx-fd arithmetic",
            question.problem.question,
            tuple(question.answer.split("\n")),
            parsing.same_answer(parsing.final_answer(question.answer), question.problem.answer),
            question.first_error - 1,
        )
        for question in exam
    )


def examine(
    pair: Pair,
    exam: Sequence[Question],
    options: GenerationOptions,
    progress: Progress,
    batch_size: int = 32,
) -> list[Result]:
    """Let the student, as it is now, take an examination; greedily.

    Args:
        pair: the student, and the tokenizer that it shares with the expert.
        exam: the questions.
        options: token limits.
        progress: told of every token.
        batch_size: questions at once.
    """
    found: list[Result] = []
    tokenizer = pair.student_lm.tokenizer
    request = feedback_request(tokenizer)
    for begin in range(0, len(exam), batch_size):
        chunk = exam[begin : begin + batch_size]
        prompts = [
            (
                *first_prompt(tokenizer, answer_prompt(question.problem.question)),
                *tokenizer.encode(question.answer, add_special_tokens=False),
                *request,
            )
            for question in chunk
        ]
        read = [prefill(pair.student_lm, Conversation(), prompt) for prompt in prompts]
        turns = generate(
            pair.student_lm,
            [before for _, before in read],
            [prompt[-1:] for prompt in prompts],
            Sampling(options.max_feedback_tokens),
            keep=False,
            on_token=lambda count: progress("exam", count),
        )
        own = answer(
            pair.student_lm,
            [q.problem for q in chunk],
            options,
            0,
            progress,
            temperature=0.0,
            keep=False,
        )
        for question, prompt, (hidden, before), turn, draft in zip(
            chunk, prompts, read, turns, own, strict=True
        ):
            feedback = parsed(turn)
            score = head_score(pair.student, pair.student_lm, hidden, before, prompt, turn)
            named = arithmetic.first_error(feedback.text)
            found.append(
                Result(
                    question.first_error > 0,
                    abs(score - question.score),
                    abs((feedback.score or 0.0) - question.score),
                    feedback.score is not None and named is not None,
                    named == question.first_error,
                    is_correct(draft.answer.final, question.problem),
                )
            )
    return found


def save_results(path: Path, results: Sequence[Result], seconds: float) -> None:
    """Keep what the student made of an examination, and how many seconds it took."""
    rows = [dataclasses.asdict(result) for result in results]
    write_json(path, with_digest({"seconds": round(seconds, 3), "results": rows}))


def load_results(
    path: Path, exam: Sequence[Question]
) -> tuple[tuple[list[Result], float], bool] | None:
    """What :func:`save_results` kept.

    Args:
        path: the file.
        exam: the questions, which have to be those of the file.

    Returns:
        The results and the seconds (0 where an older version did not measure them), and whether a
        digest vouches for them; ``None`` where there is no such file.

    Raises:
        ChangedFile: it is not what was written, or of another examination.
    """
    try:
        content, digested = read_checked(path)
    except FileNotFoundError:
        return None
    try:
        if isinstance(content, list):  # an older version's
            content = {"seconds": 0.0, "results": content}
        results = [Result(**row) for row in content["results"]]
        typed = all(
            type(getattr(result, name)).__name__ == kind
            for result in results
            for name, kind in _KINDS.items()
        )
        asked = [question.first_error > 0 for question in exam]
        if not typed or [result.wrong for result in results] != asked:
            raise ChangedFile("it is not of this examination's questions")
        return (results, float(content["seconds"])), digested
    except (KeyError, TypeError, AttributeError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error


def compare(before: Sequence[Result], after: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Two examinations on the same questions, side by side.

    Returns:
        For each measure ``before``, ``after`` and ``change``, each with value, 95 % bootstrap
        interval (paired for the change) and n.
    """

    def column(results: Sequence[Result], name: str, only: bool | None = None) -> Rows:
        return np.array(
            [
                float(getattr(r, name)) if only is None or r.wrong == only else math.nan
                for r in results
            ]
        )

    def sides(name: str, only: bool | None = None) -> dict[str, Any]:
        old, new = column(before, name, only), column(after, name, only)
        if only is not None:
            keep = ~np.isnan(old)
            old, new = old[keep], new[keep]
        return {
            "before": bootstrap([old], mean).to_json(),
            "after": bootstrap([new], mean).to_json(),
            "change": bootstrap([new, old], mean_gain).to_json(),
        }

    wrong = column(before, "wrong")
    old, new = column(before, "found"), column(after, "found")
    return {
        "score_error": sides("score_error"),
        "written_error": sides("written_error"),
        "readable": sides("readable"),
        "first_error_on_wrong": sides("found", only=True),
        "first_error_on_right": sides("found", only=False),
        "first_error_f1": {
            "before": bootstrap([old, wrong], f1).to_json(),
            "after": bootstrap([new, wrong], f1).to_json(),
            "change": bootstrap([new, old, wrong], lambda a, b, w: f1(a, w) - f1(b, w)).to_json(),
        },
        "solved": sides("solved"),
    }


def exam_questions(config: Config) -> tuple[Question, ...]:
    """The questions of a run's examination; none where the truth about answers is not known."""
    size = config.episode.exam_size
    truth = truth_of(config.problems.problems)
    return () if truth is None or not size else truth.questions(size, config.episode.seed, "test")
