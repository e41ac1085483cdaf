"""The tutor: a page at ``/``, and ``POST /v1/tutor``, which it asks.

The page is three files without a build step. It asks nobody but this server, runs no script but its
own, and puts what models and learners write into the page as text, never as HTML.
"""

from __future__ import annotations

import asyncio
import functools
import json
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_fd.evaluation.cascade.scores import HEAD
from mlx_fd.feedback.stages import verdict_score
from mlx_fd.feedback.tutoring import (
    Attempt,
    Heard,
    agreement,
    as_asked,
    as_json,
    read_attempt,
    write_attempt,
    write_step_of,
)
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.lanes import Job
from mlx_fd.models.writing import Sampling
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import read_final
from mlx_fd.serve.cascade import decide
from mlx_fd.serve.errors import bad
from mlx_fd.serve.exchange import Exchange, Reply, read_json
from mlx_fd.serve.judging import judge
from mlx_fd.serve.models import CASCADE, STUDENT, Served
from mlx_fd.serve.prompts import Asked, ask_chat, ask_feedback
from mlx_fd.serve.schema import ChatRequest, Common, Fields
from mlx_fd.serve.service import Service
from mlx_fd.serve.speaking import Speaking

# What a browser may have without a key: nobody's words stand in it.
PAGES = {
    "/": ("tutor.html", "text/html"),
    "/tutor.css": ("tutor.css", "text/css"),
    "/tutor.js": ("tutor.js", "text/javascript"),
}
_SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
_MOST_STEPS = 64
# Problems whose own answer is remembered: a learner revises an attempt at the same one.
_REMEMBERED = 256


@dataclass(frozen=True)
class _Own:
    """What the models arrived at, and who of them."""

    final: str | None
    by: str


@dataclass
class _Known:
    """What was asked lately, by models whose weights have not changed since."""

    served: weakref.ref[Served]
    answers: OrderedDict[str, _Own] = field(default_factory=OrderedDict)


def routes(service: Service) -> list[Route]:
    """The page's files, and ``/v1/tutor``."""
    limits = service.options.limits
    known = _Known(weakref.ref(service.served))

    async def page(request: Request) -> Response:
        name, kind = PAGES[request.url.path]
        body = (files("mlx_fd.serve") / "static" / name).read_bytes()
        return Response(body, media_type=kind, headers=_SAFE)

    async def own_answer(asked: Problem, prompts: Asked) -> _Own:
        if known.served() is not service.served:  # other weights
            known.answers.clear()
            known.served = weakref.ref(service.served)
        answers = known.answers
        own = answers.get(asked.question) or await _solve(service, asked, prompts)
        answers[asked.question] = own
        answers.move_to_end(asked.question)
        if len(answers) > _REMEMBERED:
            answers.popitem(last=False)
        return own

    async def tutor(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            problem, attempt = _read(content)
            async with service.admission.enter(min(2, limits.most)):
                asked = as_asked(problem, service.served.judge.ref.answer_kind)
                answer = write_attempt(attempt, write_step_of(service.served.judge.ref))
                sampling = Sampling(service.feedback_tokens)
                ask = functools.partial(
                    ask_feedback, service.served, ((problem, answer),), sampling.max_tokens, limits
                )
                [prompt] = await service.aside(ask)
                # Before the group, out of which a refusal would come as a group.
                prompts = await service.aside(functools.partial(_prompts, service, asked))
                async with asyncio.TaskGroup() as group:
                    judging = group.create_task(judge(service, prompt, sampling, text=True))
                    solving = group.create_task(own_answer(asked, prompts))
            verdict, own = judging.result(), solving.result()
            score = verdict_score(verdict.written_score, verdict.score)
            agrees = agreement(asked, answer, own.final)
            heard = Heard(verdict.text, score, own.final, agrees)
            found = as_json(problem, attempt, heard, own.by)
            note = request.scope["mlx_fd"]
            note["fields"] = {"state": found["state"], "steps": len(attempt.steps)}
            note["texts"] = {"asked": json.dumps([problem, answer]), "answer": json.dumps(found)}
            await reply.json(found)

        return Exchange(work, limits.seconds)

    return [
        *(Route(path, page, methods=["GET"]) for path in PAGES),
        Route("/v1/tutor", tutor, methods=["POST"]),
    ]


def _read(content: Any) -> tuple[str, Attempt]:
    """The problem and the attempt of a request.

    Raises:
        ApiError: it cannot be read.
    """
    fields = Fields(content)
    problem, text = fields.text("problem"), fields.text("attempt")
    fields.end()
    attempt = read_attempt(text)
    if not attempt.steps and not attempt.final:
        raise bad("'attempt' has neither a step nor an answer.", "attempt")
    if len(attempt.steps) > _MOST_STEPS:
        raise bad(
            f"'attempt' has {len(attempt.steps)} steps, and may have {_MOST_STEPS}.", "attempt"
        )
    return problem.strip(), attempt


def _prompts(service: Service, asked: Problem) -> Asked:
    """A learner's problem as the models are asked it.

    Raises:
        ApiError: it is too long for them.
    """
    common = Common(
        _solver(service), Sampling(service.default_tokens), (), stream=False, usage=False
    )
    request = ChatRequest(common, (("user", asked.question),), None)
    return ask_chat(
        service.served,
        request,
        service.options.limits,
        verbatim=False,
        judges=service.rule.score is HEAD,
    )


def _solver(service: Service) -> str:
    return CASCADE if CASCADE in service.served.names else STUDENT


async def _solve(service: Service, asked: Problem, prompts: Asked) -> _Own:
    """The answer of the cascade, or of a student that has none, to a learner's problem."""
    model, sampling = _solver(service), Sampling(service.default_tokens)

    def job(prompt: tuple[int, ...], *, keep: bool = False, logprobs: bool = False) -> Job:
        return Job(Conversation(), prompt, sampling, (), keep, logprobs=logprobs)

    decision = await decide(service, model, prompts, job)
    service.metrics.decided(decision)
    written = decision.answer
    if written is None or decision.by != STUDENT:
        wanted = job(prompts.prompts[decision.by])
        thinking = prompts.thinking[decision.by]
        writing = Speaking(service.engine, thinking, decision.by, wanted)
        try:
            written = await writing.written()
        finally:
            writing.drop()
    service.metrics.answered(model, decision, written)
    return _Own(read_final(written.text, asked), decision.by)
