"""What the student makes of answers, written beside all else that it writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlx_fd.feedback.criticism import Criticism, head_score, parsed
from mlx_fd.models.conversation import Conversation, prefill, rewind_to
from mlx_fd.models.generation import with_thought
from mlx_fd.models.lanes import Job
from mlx_fd.models.writing import Sampling, Turn
from mlx_fd.problems.arithmetic import first_error
from mlx_fd.serve.models import STUDENT, Served
from mlx_fd.serve.service import Service
from mlx_fd.serve.speaking import Speaking


@dataclass(frozen=True)
class Verdict:
    """A judgement.

    Attributes:
        score: the head's, in (-1, 1); ``None``: there is no trained head.
        written_score: the one in the text; ``None`` where none can be read, or no text is written.
        text: the criticism.
        first_wrong_step: the step that the text names, from 1; 0: it finds every step right;
            ``None``: it does not say so that it can be read.
        finished: whether the student ended the text itself.
        thought: what it thought before; empty: nothing.
        drawn: tokens that were written for it, those of the thought included.
        measured: whether the head read what it would read in a calibration: before any text, or
            behind the likeliest one, cut where that is.
    """

    score: float | None
    written_score: float | None = None
    text: str = ""
    first_wrong_step: int | None = None
    finished: bool = True
    thought: str = ""
    drawn: int = 0
    measured: bool = True


async def judge(
    service: Service,
    prompt: tuple[int, ...],
    sampling: Sampling,
    read: Conversation | None = None,
    *,
    text: bool,
) -> Verdict:
    """Judge one answer.

    Args:
        service: the models.
        prompt: all tokens before the feedback.
        sampling: of its text; the repetition penalty is that of the student's run.
        read: a conversation that begins alike, whose state is used where it can be.
        text: whether its text is wanted; without it a score that is read before the text costs no
            writing.
    """
    student = service.served.judge.student if service.served.scores else None
    thinking = service.served.student.thinking
    thinks = thinking is not None and thinking.on
    behind = student is not None and (thinks or student.score_at != "prompt")

    def begin(models: Served) -> tuple[Conversation, float | None]:
        loaded = models.student
        start = Conversation() if read is None else rewind_to(read, prompt)
        if start.cache is None:
            start = Conversation()
        hidden, before = prefill(loaded, start, prompt[len(start.tokens) :])
        score = None if student is None or behind else float(student.score(hidden))
        service.metrics.took(STUDENT, len(prompt) - len(start.tokens))
        return before, score

    before, score = Conversation(), None
    if not thinks:
        before, score = await service.engine.call(begin)
    if not text and not behind:
        return Verdict(score)
    penalty = service.served.judge.ref.repetition_penalty
    sampling = dataclasses.replace(sampling, repetition_penalty=penalty)
    job = Job(before, prompt[len(before.tokens) :], sampling)
    writing = Speaking(service.engine, thinking, STUDENT, job)
    try:
        written = await writing.written()
    finally:
        writing.drop()
    prompt = with_thought(service.served.student, prompt, written.opening)
    finished = written.reason == "stop"
    said = Turn(written.text.strip(), written.tokens, finished, written.conversation, written.read)
    if student is not None and behind:
        trained = student

        def end(models: Served) -> float:
            criticism = Criticism(said, prompt, before)
            again = len(said.tokens) - 1 if trained.scores_at_end else 0
            service.metrics.took(STUDENT, len(prompt) - len(before.tokens) + again)
            return head_score(trained, models.student, criticism)

        score = await service.engine.call(end)
    feedback, usual = parsed(said), service.feedback_tokens
    as_long = len(written.tokens) <= usual and (finished or sampling.max_tokens >= usual)
    return Verdict(
        score,
        feedback.written_score,
        feedback.text,
        first_error(feedback.text),
        finished,
        written.thought,
        written.drawn,
        not behind or (as_long and not sampling.temperature),
    )
