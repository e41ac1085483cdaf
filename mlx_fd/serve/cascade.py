"""Who answers: the student, unless the score of its answer is too low; then the expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mlx_fd.evaluation.cascade.scores import HEAD, answer_score
from mlx_fd.models.lanes import Job
from mlx_fd.models.writing import Sampling
from mlx_fd.serve.engine import Written
from mlx_fd.serve.judging import judge
from mlx_fd.serve.models import CASCADE, EXPERT, STUDENT
from mlx_fd.serve.prompts import Asked
from mlx_fd.serve.rule import Decision, decided, unmeasured
from mlx_fd.serve.service import Service
from mlx_fd.serve.speaking import Speaking


async def decide(service: Service, model: str, asked: Asked, job: Callable[..., Job]) -> Decision:
    """Let the student answer, and score its answer, where the cascade is asked.

    Args:
        service: models and rule.
        model: who was asked.
        asked: the request in tokens.
        job: makes the job of a prompt.
    """
    if model != CASCADE:
        return Decision(model, f"the request asked for the {model}")
    rule, prompt = service.rule, asked.prompts[STUDENT]
    judges = rule.score is HEAD
    wanted = job(prompt, keep=judges, logprobs=not judges)
    writing = Speaking(service.engine, asked.thinking[STUDENT], STUDENT, wanted)
    try:
        answer = await writing.written()
    finally:
        writing.drop()
    judging = 0
    if judges:
        score, judging = await _head_score(service, prompt, answer)
    else:
        score = answer_score(answer.logprobs, finished=answer.reason == "stop")
    other = "models that think as this request wants it" if asked.thinks_otherwise else ""
    if not other and rule.confidence is not None:
        other = unmeasured(rule, wanted.sampling, answer, in_form=asked.problem)
    if other:
        rule = dataclasses.replace(rule, confidence=None)
    decision = decided(rule, score, answer, has_expert=EXPERT in asked.prompts)
    decision = dataclasses.replace(decision, judging=judging)
    if not other:
        return decision
    return dataclasses.replace(decision, reason=f"{decision.reason}; it was not set for {other}")


async def _head_score(
    service: Service, prompt: tuple[int, ...], answer: Written
) -> tuple[float, int]:
    """The score head's score of the student's own answer, and the tokens written for it."""
    served = service.served
    loaded = served.student
    reply = answer.tokens
    if answer.cut:  # what the client sees is judged
        reply = tuple(loaded.tokenizer.encode(answer.text, add_special_tokens=False))
    request = served.judge.own_request(prompt, reply)
    sampling = Sampling(service.feedback_tokens)
    verdict = await judge(service, request, sampling, answer.conversation, text=False)
    assert verdict.score is not None
    return verdict.score, verdict.drawn
