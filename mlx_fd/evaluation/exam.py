"""An examination of the student where the truth is known: before a run, and after it.

The questions are answers to problems of which all is known, half of them with one error. The
student gives its feedback on each, and solves the problem itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mlx_fd.config import Config, GenerationOptions
from mlx_fd.errors import UserError
from mlx_fd.evaluation.measures import Measure, difference
from mlx_fd.evaluation.processbench import f1
from mlx_fd.feedback.asking import OnTokens
from mlx_fd.feedback.criticism import criticisms, feedback_request, head_score, parsed
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.turns import answer, as_student
from mlx_fd.files import write_json
from mlx_fd.models import fingerprint, ranks
from mlx_fd.models.generation import said
from mlx_fd.models.writing import GenerateOptions, sampling_for
from mlx_fd.problems import arithmetic
from mlx_fd.problems.kinds import are_graded, form_of
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.problems.sources import Question, truth_of
from mlx_fd.runs.checked import ChangedFile, read_checked, with_digest
from mlx_fd.runs.records.exam import ExamFile, ExamResultRow
from mlx_fd.runs.records.parts import BeforeAfterRow

# The most questions that are answered together.
_TOGETHER = 32


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


def examine(
    pair: Pair,
    exam: Sequence[Question],
    options: GenerationOptions,
    on_tokens: OnTokens,
) -> list[Result]:
    """Let the student, as it is now, take an examination; greedily. Each rank asks its share.

    Args:
        pair: the student, and the tokenizer that it shares with the expert.
        exam: answers with known scores and first errors.
        options: token limits of feedback and answers, and the batch's size, which no more
            questions are answered together than: the memory's estimate is of so many.
        on_tokens: called with a step's name and its new tokens.
    """
    results: list[Result] = []
    batch_size = min(_TOGETHER, options.batch_size)
    loaded = pair.student_lm
    request = feedback_request(loaded)
    exam = ranks.share(exam)
    for begin in range(0, len(exam), batch_size):
        chunk = exam[begin : begin + batch_size]
        prompts = [
            (
                *said(
                    loaded,
                    answer_prompt(question.problem.question, form_of(question.problem)),
                    loaded.tokenizer.encode(question.answer, add_special_tokens=False),
                ),
                *request,
            )
            for question in chunk
        ]
        written = criticisms(
            loaded,
            prompts,
            dataclasses.replace(sampling_for(options, "student_feedback", 0), temperature=0.0),
            GenerateOptions(on_token=lambda count: on_tokens("exam", count)),
        )
        solutions = answer(
            pair.student_lm,
            [q.problem for q in chunk],
            as_student(options),
            0,
            on_tokens,
            temperature=0.0,
            keep=False,
        )
        for question, one, solution in zip(chunk, written, solutions, strict=True):
            feedback = parsed(one.turn)
            score = head_score(pair.student, loaded, one)
            named = arithmetic.first_error(feedback.text)
            results.append(
                Result(
                    wrong=question.first_error > 0,
                    score_error=abs(score - question.score),
                    written_error=abs((feedback.written_score or 0.0) - question.score),
                    readable=feedback.written_score is not None and named is not None,
                    found=named == question.first_error,
                    solved=bool(solution.is_correct),
                )
            )
    return [Result(**row) for row in ranks.gather([dataclasses.asdict(one) for one in results])]


def exam_digest(exam: Sequence[Question], config: Config, student: Sequence[Path]) -> str:
    """Which examination it is: its questions, how they are put, and who takes it, as SHA-256.

    Args:
        exam: the questions.
        config: of the run: limits of what is written, and the seed of what training begins with.
        student: the folders of the student's weights.
    """
    asked = [[q.problem.question, q.answer, q.first_error, q.score] for q in exam]
    writing, models = config.generation, config.models
    thought = writing.max_thinking_tokens if writing.student_thinking == "on" else 0
    limits = [writing.max_answer_tokens, writing.max_feedback_tokens, thought]
    read = [writing.answer_filter, writing.student_repetition_penalty]
    weights = [fingerprint.content_hash(folder) for folder in student]
    made = [models.train, models.lora_rank, models.score_at, config.episode.seed]
    whole = json.dumps([asked, limits, read, weights, made])
    return hashlib.sha256(whole.encode()).hexdigest()


def save_results(path: Path, results: Sequence[Result], seconds: float, digest: str) -> None:
    """Keep what the student made of an examination.

    Args:
        path: the file.
        results: one for each question.
        seconds: what it took.
        digest: of :func:`exam_digest`.
    """
    rows = cast(list[ExamResultRow], [dataclasses.asdict(result) for result in results])
    content: ExamFile = {"seconds": round(seconds, 3), "exam_sha256": digest, "results": rows}
    write_json(path, with_digest(content))


def load_results(
    path: Path, exam: Sequence[Question], digest: str
) -> tuple[tuple[list[Result], float], bool] | None:
    """What :func:`save_results` kept.

    Args:
        path: the file.
        exam: the questions, which have to be those of the file.
        digest: of :func:`exam_digest`; a file of an older version has none.

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
        wrong = [question.first_error > 0 for question in exam]
        if not typed or [result.wrong for result in results] != wrong:
            raise ChangedFile("it is not of this examination's questions")
        if content.get("exam_sha256", digest) != digest:
            raise ChangedFile("it is of other questions, token limits, or another student or seed")
        return (results, float(content["seconds"])), digested
    except (KeyError, TypeError, AttributeError) as error:
        raise ChangedFile(f"it is not what mlx-fd writes ({error!r})") from error


def compare(
    before: Sequence[Result], after: Sequence[Result], *, by_head: bool = True
) -> dict[str, BeforeAfterRow]:
    """Two examinations on the same questions, side by side.

    Args:
        before: the first.
        after: the second.
        by_head: whether the score head was taught, so that it can be in error.

    Returns:
        For each measure ``before``, ``after`` and ``change``, each with value, 95 % interval
        (Wilson's for a share, else the bootstrap's; paired for the change) and n.
    """

    def column(results: Sequence[Result], name: str, only: bool | None = None) -> list[float]:
        return [float(getattr(r, name)) for r in results if only is None or r.wrong == only]

    def sides(name: str, only: bool | None = None) -> BeforeAfterRow:
        return _sides(
            Measure(name, column(before, name, only)), Measure(name, column(after, name, only))
        )

    wrong = column(before, "wrong")
    old, new = column(before, "found"), column(after, "found")
    return {
        **({"score_error": sides("score_error")} if by_head else {}),
        "written_error": sides("written_error"),
        "readable": sides("readable"),
        "first_error_on_wrong": sides("found", only=True),
        "first_error_on_right": sides("found", only=False),
        "first_error_f1": _sides(
            Measure("found", old, f1, (wrong,)), Measure("found", new, f1, (wrong,))
        ),
        "solved": sides("solved"),
    }


def _sides(before: Measure, after: Measure) -> BeforeAfterRow:
    change, _ = difference(after, before)
    return {
        "before": before.estimate().to_json(),
        "after": after.estimate().to_json(),
        "change": change.to_json(),
    }


def exam_questions(config: Config, split: str = "test") -> tuple[Question, ...]:
    """The questions of a run's examination; none where the truth about answers is not known.

    Args:
        config: the run's.
        split: whose problems they are: ``test`` for what is reported, ``validation`` for what
            something is chosen by.

    Raises:
        UserError: its problems have no right answers.
    """
    size = config.episode.exam_size
    truth = truth_of(config.problems.problems)
    questions = truth.questions(size, config.episode.seed, split) if truth and size else ()
    if not are_graded(question.problem for question in questions):
        raise UserError(
            f"{config.problems.problems}: the examination asks for problems with right answers, "
            "and these have none; set exam_size to 0"
        )
    return questions
