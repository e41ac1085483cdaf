"""Chats and completions, as OpenAI's clients ask for them."""

from __future__ import annotations

import functools
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.scores import HEAD
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.lanes import Job
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.serve.cascade import decide
from mlx_fd.serve.engine import Writing, Written
from mlx_fd.serve.exchange import Exchange, Reply, read_json
from mlx_fd.serve.kept import EXPERT as BY_EXPERT
from mlx_fd.serve.models import EXPERT, STUDENT
from mlx_fd.serve.prompts import Asked, ask_chat, ask_completion
from mlx_fd.serve.rule import Decision
from mlx_fd.serve.schema import Common, chat_request, completion_request
from mlx_fd.serve.service import Service
from mlx_fd.serve.speaking import Speaking


def routes(service: Service) -> list[Route]:
    """``/v1/chat/completions`` and ``/v1/completions``."""
    limits, default_tokens = service.options.limits, service.default_tokens

    async def chat(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            read = chat_request(content, limits, default_tokens)
            async with service.admission.enter():
                # Within: the models and their rule may be others than when it came.
                ask = functools.partial(
                    ask_chat,
                    service.served,
                    read,
                    limits,
                    verbatim=service.options.verbatim,
                    judges=service.rule.score is HEAD,
                )
                asked = await service.aside(ask)
                shape = _Shape("chat.completion", "chatcmpl-", read.common.model)
                texts = {"asked": json.dumps(read.messages)}
                task = _Task(
                    service, request, read.common, asked, shape, texts, read.messages[-1][1]
                )
                await _answer(task, reply)

        return Exchange(work, limits.seconds)

    async def completion(request: Request) -> Exchange:
        content = await read_json(request, limits)

        async def work(reply: Reply) -> None:
            read = completion_request(content, limits, default_tokens)
            async with service.admission.enter():
                asked = await service.aside(
                    functools.partial(ask_completion, service.served, read, limits)
                )
                shape = _Shape("text_completion", "cmpl-", read.common.model)
                texts = {"asked": read.prompt}
                await _answer(_Task(service, request, read.common, asked, shape, texts), reply)

        return Exchange(work, limits.seconds)

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]


class _Shape:
    """How a reply is written: as a chat's or as a completion's, whole or in pieces."""

    def __init__(self, kind: str, prefix: str, model: str):
        self._chat = kind == "chat.completion"
        self._kind, self._model = kind, model
        self._id, self._created = prefix + uuid.uuid4().hex, int(time.time())

    def whole(
        self, written: Written, usage: dict[str, Any], ours: dict[str, Any]
    ) -> dict[str, Any]:
        """A reply in one."""
        said: dict[str, Any] = {"text": written.text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": written.text, "refusal": None}}
            if written.thought:
                said["message"]["reasoning_content"] = written.thought
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": written.reason}
        return {**self._envelope(self._kind), "choices": [choice], "usage": usage, "mlx_fd": ours}

    def first(self, ours: dict[str, Any]) -> str:
        """A stream's first event: who answers."""
        delta = {"role": "assistant", "content": ""} if self._chat else None
        return self._piece(delta, "", None, {"mlx_fd": ours})

    def piece(self, text: str) -> str:
        """An event with some text."""
        return self._piece({"content": text}, text, None, {})

    def thought(self, text: str) -> str:
        """An event with some of what is thought before."""
        return self._piece({"reasoning_content": text}, "", None, {})

    def last(self, reason: str) -> str:
        """An event that says why the text ends."""
        return self._piece({}, "", reason, {})

    def usage(self, usage: dict[str, Any], ours: dict[str, Any]) -> str:
        """An event that says what it took."""
        found = {"choices": [], "usage": usage, "mlx_fd": ours}
        return json.dumps({**self._envelope(self._chunk), **found})

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._chat else self._kind

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _piece(
        self, delta: dict[str, Any] | None, text: str, reason: str | None, more: dict[str, Any]
    ) -> str:
        said: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return json.dumps({**self._envelope(self._chunk), "choices": [choice], **more})


@dataclass(frozen=True)
class _Task:
    """A request that is worked on."""

    service: Service
    request: Request
    common: Common
    asked: Asked
    shape: _Shape
    texts: dict[str, str]
    question: str = ""

    def job(
        self,
        prompt: tuple[int, ...],
        *,
        keep: bool = False,
        streams: bool = False,
        logprobs: bool = False,
    ) -> Job:
        """The job of a prompt; its switches as :class:`Job` has them."""
        common = self.common
        return Job(Conversation(), prompt, common.sampling, common.stops, keep, streams, logprobs)


async def _answer(task: _Task, reply: Reply) -> None:
    """Decide who answers, and answer."""
    service, common = task.service, task.common
    decision = await decide(service, common.model, task.asked, task.job)
    service.metrics.decided(decision)
    headers = decision.headers()
    note = task.request.scope["mlx_fd"]
    # Of a reply that breaks off, too, the log says who gave it.
    note["fields"] = {"model": common.model, **_ours(task, decision, None)}
    if common.stream:
        await reply.events(headers)
        await reply.event(task.shape.first(_ours(task, decision, None)))
    if decision.answer is not None and decision.by == STUDENT:
        written = decision.answer
        if common.stream and written.thought:
            await reply.event(task.shape.thought(written.thought))
        if common.stream and written.text:
            await reply.event(task.shape.piece(written.text))
    else:
        job = task.job(task.asked.prompts[decision.by], streams=common.stream)
        writing: Speaking | Writing = (
            Speaking(service.engine, task.asked.thinking[decision.by], decision.by, job)
            if task.asked.chat
            else service.engine.write(decision.by, job)
        )
        try:
            if common.stream and isinstance(writing, Speaking):
                async for piece in writing.thoughts():
                    await reply.event(task.shape.thought(piece))
            if common.stream:
                async for piece in writing.pieces():
                    await reply.event(task.shape.piece(piece))
            written = await writing.written()
        finally:
            writing.drop()
    service.metrics.answered(common.model, decision, written)
    await _keep(task, decision, written)
    usage, ours = _usage(task, decision, written), _ours(task, decision, written)
    note["fields"] = {"model": common.model, **ours, **usage}
    note["texts"] = {**task.texts, "answer": written.text}
    if not common.stream:
        await reply.json(task.shape.whole(written, usage, ours), 200, headers)
        return
    await reply.event(task.shape.last(written.reason))
    if common.usage:
        await reply.event(task.shape.usage(usage, ours))
    await reply.event("[DONE]")
    await reply.end()


async def _keep(task: _Task, decision: Decision, written: Written) -> None:
    """Keep a problem that the student had to pass on, where anything is kept."""
    kept = task.service.kept
    passed_on = decision.by == EXPERT and decision.answer is not None
    whole = written.reason == "stop" and not written.cut
    if kept is None or not passed_on or not task.asked.problem or not whole:
        return
    form = task.service.served.form
    assert form is not None  # it was asked as a problem
    # Who sends the form of the training along asks the question in it.
    question = task.question.rstrip().removesuffix(answer_prompt("", form)).rstrip()
    try:
        await task.service.aside(
            lambda: kept.add(question or task.question, written.text, BY_EXPERT)
        )
    except (OSError, UserError) as error:  # a full disk: the answer is worth more
        task.service.log.write("not_kept", error=str(error))


def _usage(task: _Task, decision: Decision, written: Written) -> dict[str, Any]:
    """Tokens of the conversation that the client sees."""
    prompt, reply = len(task.asked.prompts[decision.by]), written.drawn
    found = {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}
    if not written.thought_tokens:
        return found
    return {**found, "completion_tokens_details": {"reasoning_tokens": written.thought_tokens}}


def _ours(task: _Task, decision: Decision, written: Written | None) -> dict[str, Any]:
    """The field ``mlx_fd``: who answers and why, and once it is known what each model wrote."""
    found = {**decision.field(), "asked_as": "problem" if task.asked.problem else "verbatim"}
    if written is None:
        return found
    wrote = {STUDENT: decision.judging, EXPERT: 0}
    if decision.answer is not None:
        wrote[STUDENT] += decision.answer.drawn
    if written is not decision.answer:
        wrote[decision.by] += written.drawn
    return {**found, "student_tokens": wrote[STUDENT], "expert_tokens": wrote[EXPERT]}
