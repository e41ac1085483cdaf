"""``POST /v1/feedback``: the student judges answers."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from mlx_fd.evaluation.cascade.scores import HEAD
from mlx_fd.serve.exchange import Exchange, Reply, read_json
from mlx_fd.serve.judging import Verdict, judge
from mlx_fd.serve.prompts import ask_feedback
from mlx_fd.serve.schema import feedback_request
from mlx_fd.serve.service import Service


def routes(service: Service) -> list[Route]:
    """``/v1/feedback``."""
    limits = service.options.limits

    async def feedback(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            read = feedback_request(content, limits, service.feedback_tokens)
            sampling = read.sampling
            async with service.admission.enter(len(read.items)):
                ask = functools.partial(
                    ask_feedback, service.served, read.items, sampling.max_tokens, limits
                )
                prompts = await service.aside(ask)
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(judge(service, prompt, sampling, text=read.text))
                        for prompt in prompts
                    ]
            found = [content_of(service, task.result(), text=read.text) for task in tasks]
            note = request.scope["mlx_fd"]
            note["fields"] = {"items": len(found)}
            note["texts"] = {"asked": json.dumps(read.items), "answer": json.dumps(found)}
            if read.several:
                await reply.json({"object": "list", "data": found})
            else:
                await reply.json(found[0])

        return Exchange(work, limits.seconds)

    return [Route("/v1/feedback", feedback, methods=["POST"])]


def content_of(service: Service, verdict: Verdict, *, text: bool) -> dict[str, Any]:
    """A judgement as a client gets it, with its ``text`` where that was asked for."""
    confidence, rule = None, service.rule
    calibrated = rule.score is HEAD and verdict.measured
    if verdict.score is not None and calibrated and rule.confidence is not None:
        confidence = round(rule.confidence(verdict.score), 4)
    return {
        "object": "feedback",
        "score": None if verdict.score is None else round(verdict.score, 4),
        "confidence": confidence,
        "written_score": verdict.written_score,
        "first_wrong_step": verdict.first_wrong_step,
        **({"feedback": verdict.text} if text else {}),
        "finished": verdict.finished,
        **({"thought": verdict.thought} if text and verdict.thought else {}),
    }
