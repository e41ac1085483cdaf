"""A reply, and what its model thinks before it: two texts of a lane, one after the other.

The thought is written first, up to the mark that ends it or its limit, and the reply from there on,
as :mod:`mlx_fd.models.generation` writes turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from mlx_fd.models.conversation import Conversation
from mlx_fd.models.lanes import Job
from mlx_fd.models.thinking import Thinking
from mlx_fd.serve.engine import Engine, Written
from mlx_fd.serve.errors import bad


def thinking_tokens(thinking: Thinking | None) -> int:
    """The most tokens that a thought takes, with its marks; 0 where none is had."""
    if thinking is None or not thinking.on:
        return 0
    return thinking.limit + len(thinking.opened_ids) + len(thinking.force_ids)


class Speaking:
    """A reply that is being written: its thought first, where its model thinks."""

    def __init__(self, engine: Engine, thinking: Thinking | None, who: str, job: Job):
        """Begin to write.

        Args:
            engine: the models' thread.
            thinking: how the model thinks, and whether it shall; ``None``: it cannot.
            who: ``"student"`` or ``"expert"``.
            job: the reply's; its prompt is a chat's, as
                :func:`mlx_fd.models.generation.messages_prompt` gives it.

        Raises:
            ApiError: the model thinks, and the prompt has no place for a thought.
        """
        if thinking is not None:
            job = dataclasses.replace(job, banned=thinking.banned_id)
        self._engine, self._who, self._job = engine, who, job
        self._thinking = thinking if thinking is not None and thinking.on else None
        self._thought: Written | None = None
        self._begun: tuple[int, ...] = ()
        # Once there is a thought: whether the turn ended within it, so that nothing is said.
        self._ended_within = False
        self._opening: tuple[int, ...] = ()
        if self._thinking is None:
            self._writing = engine.write(who, job)
            return
        old = job.conversation
        apart = self._thinking.taken_apart((*old.tokens, *job.prompt))
        if apart is None or len(apart[0]) <= len(old.tokens):
            raise bad(
                f"This chat ends otherwise than the {who}'s template writes one, so that there is "
                "no place for a thought.",
                "messages",
            )
        self._begun = apart[1]
        thought = dataclasses.replace(
            job,
            prompt=(*apart[0][len(old.tokens) :], *self._thinking.opened_ids),
            sampling=dataclasses.replace(job.sampling, max_tokens=self._thinking.limit),
            stops=(),
            keep=True,
            ends=frozenset((self._thinking.end_id,)),
            raw=True,
        )
        self._writing = engine.write(who, thought)

    async def thoughts(self) -> AsyncIterator[str]:
        """The thought's text as it comes, where the job streams; to be read before the reply's.

        Raises:
            Exception: whatever went wrong in the models.
        """
        if self._thinking is not None and self._thought is None:
            async for piece in self._writing.pieces():
                yield piece
            await self._reply()

    async def pieces(self) -> AsyncIterator[str]:
        """The reply's text likewise."""
        await self._reply()
        if not self._ended_within:
            async for piece in self._writing.pieces():
                yield piece

    async def written(self) -> Written:
        """The whole, once it is finished; errors as :meth:`thoughts`."""
        await self._reply()
        reply, thought = await self._writing.written(), self._thought
        if thought is None:
            return reply
        if self._ended_within:
            last, logprob = thought.tokens[-1:], thought.logprobs[-1:]
            reply = dataclasses.replace(
                thought, text="", tokens=last, logprobs=logprob, read=0, accepted=0
            )
        return dataclasses.replace(
            reply,
            thought=thought.text.strip(),
            opening=self._opening,
            thought_tokens=len(thought.tokens) - self._ended_within,
            read=reply.read + thought.read,
            first=thought.first,
            accepted=reply.accepted + thought.accepted,
        )

    def drop(self) -> None:
        """Nobody waits any more."""
        self._writing.drop()

    async def _reply(self) -> None:
        """Wait for the thought, and begin the reply behind it."""
        if self._thinking is None or self._thought is not None:
            return
        self._thought = thought = await self._writing.written()
        self._ended_within, self._opening, closing = self._thinking.after(
            thought.tokens, finished=thought.reason == "stop"
        )
        if self._ended_within:
            return
        conversation, rest = thought.conversation, (*closing, *self._begun)
        if not rest:  # something has to be read, for the reply's first token to be drawn
            tokens = conversation.tokens
            conversation, rest = Conversation(tokens[:-1]), tokens[-1:]
        job = dataclasses.replace(self._job, conversation=conversation, prompt=rest)
        self._writing = self._engine.write(self._who, job)
