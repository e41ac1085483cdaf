"""Who answers: the student, unless its score of its own answer is too low; then the expert."""

from __future__ import annotations

from collections.abc import Callable

from mlx_fd.models.writing import Sampling
from mlx_fd.serve.engine import Written
from mlx_fd.serve.judging import Verdict, judge
from mlx_fd.serve.lanes import Job
from mlx_fd.serve.models import CASCADE, EXPERT, STUDENT
from mlx_fd.serve.prompts import Asked
from mlx_fd.serve.rule import Decision, decided
from mlx_fd.serve.service import Service


async def decide(service: Service, model: str, asked: Asked, job: Callable[..., Job]) -> Decision:
    """Let the student answer and judge its answer, where the cascade is asked.

    Args:
        service: models and rule.
        model: who was asked.
        asked: the request in tokens.
        job: makes the job of a prompt.
    """
    if model != CASCADE:
        return Decision(model, f"the request asked for the {model}")
    writing = service.engine.write(STUDENT, job(asked.prompts[STUDENT], keep=True))
    try:
        answer = await writing.written()
    finally:
        writing.drop()
    verdict = await judge_own(service, asked.prompts[STUDENT], answer)
    assert verdict.score is not None
    return decided(service.rule, verdict.score, answer, has_expert=EXPERT in asked.prompts)


async def judge_own(service: Service, prompt: tuple[int, ...], answer: Written) -> Verdict:
    """The student's judgement of the answer that it has just given."""
    served = service.served
    loaded = served.student
    reply = answer.tokens
    if answer.reason == "stop" and reply[-1] not in loaded.tokenizer.eos_token_ids:
        # A stop text ended it: what the client sees is judged.
        reply = tuple(loaded.tokenizer.encode(answer.text, add_special_tokens=False))
    request = served.judge.own_request(prompt, reply)
    sampling = Sampling(service.feedback_tokens)
    return await judge(service, request, sampling, answer.conversation, text=False)
