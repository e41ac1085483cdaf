"""The thread that owns the models, and how asyncio talks to it.

Orders go in by a queue; what was written comes back in one call of the event loop for each step of
all texts. No array of a model is computed anywhere else.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_fd.models.conversation import Conversation
from mlx_fd.models.lanes import Job, Lane, open_lane
from mlx_fd.serve.text import ReplyText

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.writing import Step
    from mlx_fd.serve.models import Served

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """A text that is finished.

    Attributes:
        text: what was said, without thoughts.
        tokens: all that was drawn, with the token that ended it, where one did.
        reason: ``"stop"`` or ``"length"``.
        conversation: the conversation with it; its cache where the job asked to keep it.
        read: tokens of the prompt that had to be read.
        first: seconds until the first token was there, from when the job was given.
        logprobs: of the tokens at temperature 1, where the job wanted them.
        thought: what was thought before, without marks; empty: nothing.
        opening: as :class:`mlx_fd.models.writing.Turn` has it.
        thought_tokens: tokens of the thought that the model drew.
        accepted: how many of the tokens the model's draft had proposed.
        cut: whether a stop text of the client's ended it, and not the model.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    conversation: Conversation
    read: int
    first: float
    logprobs: tuple[float, ...] = ()
    accepted: int = 0
    thought: str = ""
    opening: tuple[int, ...] = ()
    thought_tokens: int = 0
    cut: bool = False

    @property
    def drawn(self) -> int:
        """Tokens that the model drew, those of the thought included."""
        return self.thought_tokens + len(self.tokens)


class Writing:
    """A text that is being written: pieces of text as they come, then the whole."""

    def __init__(self, drop: Callable[[Writing], None]):
        self._drop = drop
        self._pieces: deque[str] = deque()
        self._came = asyncio.Event()
        self._end: Written | BaseException | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Its text as it comes, where the job streams.

        Raises:
            Exception: whatever went wrong in the models.
        """
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if self._end is not None:
                break
            self._came.clear()
            await self._came.wait()
        await self.written()

    async def written(self) -> Written:
        """The whole text, once it is finished.

        Raises:
            Exception: whatever went wrong in the models.
        """
        while self._end is None:
            self._came.clear()
            await self._came.wait()
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end

    def drop(self) -> None:
        """Nobody waits any more: its place in the batch is free at the next step."""
        if self._end is None:
            self._drop(self)

    def put(self, found: str | Written | BaseException) -> None:
        """Take what the thread has; called on the event loop."""
        if isinstance(found, str):
            self._pieces.append(found)
        else:
            self._end = found
        self._came.set()


@dataclass
class _Running:
    """A text in a lane.

    Attributes:
        writing: who waits for it.
        job: what was asked for.
        text: what it says so far.
        since: when it was given.
        first: seconds to its first token.
        tokens: drawn so far.
        said: pieces of text so far.
        logprobs: of its tokens, where they are wanted; [1] each.
        accepted: tokens so far that the model's draft had proposed.
    """

    writing: Writing
    job: Job
    text: ReplyText
    since: float
    first: float = 0.0
    tokens: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    accepted: int = 0

    @property
    def read(self) -> int:
        """Tokens that had to be read before its first one."""
        old = self.job.conversation
        return len(self.job.prompt) + (len(old.tokens) if old.cache is None else 0)


@dataclass(frozen=True)
class _Write:
    who: str
    job: Job
    writing: Writing
    since: float


@dataclass(frozen=True)
class _Drop:
    writing: Writing


@dataclass(frozen=True)
class _Call:
    function: Callable[[_Work], Any]
    done: asyncio.Future[Any]


_Order = _Write | _Drop | _Call | None


OnText = Callable[[str, int, int, int], None]
"""Called with who wrote a text, and the tokens read, written, and accepted of a draft's."""


class Engine:
    """Models on a thread of their own; all methods are of the event loop that started it."""

    def __init__(self, places: int, on_text: OnText = lambda who, read, written, accepted: None):
        """An engine that has not started.

        Args:
            places: texts that each model writes side by side.
            on_text: called on the models' thread when a text leaves, finished or not.
        """
        self._places, self._on_text = places, on_text
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.steps = 0

    async def start(self, open_models: Callable[[], Served]) -> Served:
        """Open the models on the thread, and begin.

        Raises:
            UserError: as ``open_models`` does.
        """
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[Served] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(open_models, opened), name="models", daemon=True
        )
        self._thread.start()
        return await opened

    def write(self, who: str, job: Job) -> Writing:
        """Let a model write a text, beside all that it writes already.

        Args:
            who: ``"student"`` or ``"expert"``.
            job: what to write.
        """
        writing = Writing(lambda one: self._orders.put(_Drop(one)))
        self._orders.put(_Write(who, job, writing, time.monotonic()))
        return writing

    async def call(self, function: Callable[[Served], T]) -> T:
        """What a function of the models gives, between two steps."""
        return await self._order(lambda work: function(work.models))

    async def _order(self, function: Callable[[_Work], T]) -> T:
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()
        self._orders.put(_Call(function, done))
        return await done

    async def exchange(self, function: Callable[[Served], Served]) -> Served:
        """Other models in the place of these, as a function makes them; no text is being written.

        What it raises is raised here, and the models stay.
        """

        def call(work: _Work) -> Served:
            work.models = function(work.models)
            return work.models

        return await self._order(call)

    async def stop(self) -> None:
        """End the thread; what is still being written is lost."""
        self._orders.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # ------------------------------------------------------------------------------- the thread

    def _tell(self, function: Callable[..., Any], *values: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # the loop is closed: nobody waits
            return

    def _run(self, open_models: Callable[[], Served], opened: asyncio.Future[Served]) -> None:
        try:
            models = open_models()
        except BaseException as error:
            self._tell(_fail, opened, error)
            return
        work = _Work(models, self._places, self._on_text)
        self._tell(_succeed, opened, models)
        going_on = True
        while going_on:
            going_on = self._take(work)
            found = work.step()
            self.steps += 1
            if found:
                self._tell(_deliver, found)
        work.close()

    def _take(self, work: _Work) -> bool:
        """Take the orders that are there; wait for one where nothing else is to be done."""
        if work.idle:
            work.rest()
        wait = work.idle
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if order is None:
                return False
            if isinstance(order, _Write):
                error = work.begin(order)
                if error is not None:
                    self._tell(order.writing.put, error)
            elif isinstance(order, _Drop):
                work.drop(order.writing)
            elif not order.done.cancelled():  # else nobody waits
                try:
                    self._tell(_succeed, order.done, order.function(work))
                except Exception as error:
                    self._tell(_fail, order.done, error)
                if not work.idle:
                    return True  # who is being written for gets a token before the next is read


def _succeed(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


_Found = list[tuple[Writing, str | Written | BaseException]]


def _deliver(found: _Found) -> None:
    for writing, what in found:
        writing.put(what)


class _Work:
    """What the thread does: lanes of texts."""

    def __init__(self, models: Served, places: int, on_text: OnText):
        self.models, self._places, self._on_text = models, places, on_text
        self._lanes: dict[str, Lane] = {}
        self._running: dict[tuple[str, int], _Running] = {}
        self._where: dict[Writing, tuple[str, int]] = {}

    @property
    def idle(self) -> bool:
        return not self._running

    def rest(self) -> None:
        """Give back what MLX keeps of freed buffers: a batch of another shape wants others."""
        import mlx.core as mx

        mx.clear_cache()

    def begin(self, order: _Write) -> Exception | None:
        """Let a text join; what went wrong, if something did."""
        loaded: Loaded = self.models.model(order.who)
        try:
            if order.who not in self._lanes:
                self._lanes[order.who] = open_lane(loaded, self._places)
            text = ReplyText(loaded, order.job.stops, raw=order.job.raw)
            key = order.who, self._lanes[order.who].add(order.job)
        except Exception as error:
            return error
        self._running[key] = _Running(order.writing, order.job, text, order.since)
        self._where[order.writing] = key
        return None

    def drop(self, writing: Writing) -> None:
        key = self._where.pop(writing, None)
        if key is not None:
            self._leave(key)
            self._lanes[key[0]].drop(key[1])

    def step(self) -> _Found:
        """One step of every lane; what those who wait are to be told."""
        found: _Found = []
        for who, lane in list(self._lanes.items()):
            try:
                steps = lane.step()
                for step in steps:
                    self._take(who, step, found)
            except Exception as error:  # of the model: its texts are lost, the others go on
                found += self._give_up(who, error)
        return found

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _give_up(self, who: str, error: Exception) -> _Found:
        self._lanes.pop(who).close()
        lost = [key for key in self._running if key[0] == who]
        found: _Found = []
        for key in lost:
            found.append((self._leave(key).writing, error))
        return found

    def _take(self, who: str, step: Step, found: _Found) -> None:
        key = who, step.number
        one = self._running.get(key)
        if one is None:
            return
        if not one.tokens:
            one.first = time.monotonic() - one.since
        one.tokens.append(step.token)
        one.accepted += bool(step.accepted)
        if step.logprob is not None:
            one.logprobs.append(step.logprob)
        piece = "" if step.ended == "stop" else one.text.add(step.token)
        ended, cache = step.ended, step.cache
        if one.text.stopped and ended is None:
            # Its last token was drawn, and is not in the state of the model that is kept.
            self._lanes[who].drop(step.number)
            ended = "stop"
        if ended is None:
            if piece:
                self._say(one, piece, found)
            return
        piece += one.text.end()
        if piece:
            self._say(one, piece, found)
        # Counted before it is told: who has a reply finds its tokens in the metrics.
        self._leave(key)
        found.append((one.writing, _written(one, "stop" if one.text.stopped else ended, cache)))

    def _leave(self, key: tuple[str, int]) -> _Running:
        """Take a text out, and count what it took; of one without a token nothing is known."""
        one = self._running.pop(key)
        self._where.pop(one.writing, None)
        if one.tokens:
            self._on_text(key[0], one.read, len(one.tokens), one.accepted)
        return one

    def _say(self, one: _Running, piece: str, found: _Found) -> None:
        one.said.append(piece)
        if one.job.streams:
            found.append((one.writing, piece))


def _written(one: _Running, reason: str, cache: Any) -> Written:
    import mlx.core as mx

    old, prompt = one.job.conversation, one.job.prompt
    kept = cache if one.job.keep else None
    if kept is not None:
        # Lazy slices would hold the whole batch's cache of this very step.
        mx.eval([layer.state for layer in kept])
    logprobs: Any = mx.concatenate(one.logprobs).tolist() if one.logprobs else []
    return Written(
        text="".join(one.said),
        tokens=tuple(one.tokens),
        reason=reason,
        conversation=Conversation((*old.tokens, *prompt, *one.tokens), kept),
        read=one.read,
        first=one.first,
        logprobs=tuple(logprobs),
        accepted=one.accepted,
        cut=one.text.stopped,
    )
