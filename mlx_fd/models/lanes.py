"""One model and all texts that it is writing: a batch that texts join and leave at any step.

In mlx-lm's own generator the texts that join take a step by themselves, in which nobody else
writes. Here the last token of a prompt is read in a step of all texts, so that joining costs none.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.generate import PromptProcessingBatch, generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mlx_fd.models import ranks
from mlx_fd.models.conversation import PREFILL, Cache, Conversation, can_be_cut_back
from mlx_fd.models.drawing import Seeded, greedy
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import (
    Draw,
    GenerateOptions,
    Sampling,
    Step,
    Text,
    finals,
    logits_processors,
    longest,
    token_logprobs,
    written_alone,
)

READ_TOGETHER = 8
"""Prompts that are read together, as mlx-lm has it."""


@dataclass(frozen=True)
class Job:
    """A text to write.

    Attributes:
        conversation: what was said so far; its cache, where it has one, is left as it is.
        prompt: what is to be read, at least one token.
        sampling: how to draw, and the most tokens to write.
        stops: texts before which it ends.
        keep: whether the model's state after it is wanted.
        streams: whether whoever waits wants the text as it comes.
        logprobs: the temperature at which the log-probabilities of its tokens are wanted; 0: they
            are not.
        ends: tokens that end it beside those that end a turn.
        raw: whether all of it is text, marks of thoughts too.
        mark: whether the model's state before the prompt's last token is wanted, where that after
            the text could not be cut back to it.
        states: whether the final hidden states that score heads read are wanted.
        banned: a token that is never drawn; -1: there is none; ``None``: the one that the model
            has (:attr:`mlx_fd.models.thinking.Thinking.banned_id`).
    """

    conversation: Conversation
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    keep: bool = False
    streams: bool = False
    logprobs: float = 0.0
    ends: frozenset[int] = frozenset()
    raw: bool = False
    mark: bool = False
    states: bool = False
    banned: int | None = None

    def needs_mark(self, cache: Cache) -> bool:
        """Whether ``mark`` takes a copy on the way; ``cache`` is the model's state before."""
        most = longest(self.conversation, self.prompt, self.sampling)
        return self.mark and not can_be_cut_back(cache, most)


class Lane(Protocol):
    """A model's running batch; of one thread."""

    def add(self, job: Job) -> int:
        """Let a text join at the next step; its number."""

    def drop(self, number: int) -> None:
        """Let a text leave; it may have left already."""

    def step(self) -> list[Step]:
        """Write one token of each text, or read prompts; nothing where no text is left."""

    def close(self) -> None:
        """Drop all."""


def open_lane(loaded: Loaded, places: int, together: int = READ_TOGETHER) -> Lane:
    """A lane of a model.

    Args:
        loaded: the model; with a draft it writes one text at a time.
        places: texts that it writes side by side; others wait.
        together: the most prompts that it reads at once.
    """
    alone = not loaded.batched or loaded.draft is not None
    return _AloneLane(loaded) if alone else _BatchLane(loaded, places, together)


def _draw(loaded: Loaded, job: Job, likeliest: Draw) -> Draw:
    thinking, banned = loaded.thinking, job.banned
    if thinking is not None and banned is not None and banned != thinking.banned_id:
        thinking = dataclasses.replace(thinking, banned_id=banned)
        loaded = dataclasses.replace(loaded, thinking=thinking)
        likeliest = greedy(loaded)
    return Seeded(loaded, job.sampling) if job.sampling.temperature else likeliest


@dataclass
class _Row:
    """A text in the batch, or on its way there.

    Attributes:
        number: the text's.
        job: what is to be written.
        draw: how its tokens are drawn.
        processors: of its logits.
        rest: tokens of the prompt that are still to be read, all but the last one.
        tokens: what the processors see, once the next input is there.
        left: tokens that may still be written.
        fresh: whether its next input is the prompt's last token.
        mark: the model's state before that, where it is wanted.
        first: the final hidden state at that token.
        final: the states [B, 1, d] in which its last token was predicted, and its row there.
    """

    number: int
    job: Job
    draw: Draw
    processors: list[Callable[[mx.array, mx.array], mx.array]]
    rest: list[int]
    left: int
    tokens: mx.array | None = None
    fresh: bool = True
    mark: Cache | None = None
    first: mx.array | None = None
    final: tuple[mx.array, int] | None = None


class _BatchLane:
    """Texts side by side, each at its own length, on mlx-lm's batched caches."""

    def __init__(self, loaded: Loaded, places: int, together: int):
        self._loaded, self._greedy = loaded, greedy(loaded)
        self._places, self._together = places, together
        self._ends = frozenset(loaded.tokenizer.eos_token_ids)
        self._stream = ranks.stream() or generation_stream
        self._wired_before = maybe_set_recommended_wired_limit()
        self._count = 0
        self._waiting: deque[_Row] = deque()
        # Those whose prompts are being read side by side, and what the model has read of them.
        self._reading: list[tuple[list[_Row], PromptProcessingBatch]] = []
        # Those that write: the model's state of them, each one's next input [n], and the
        # log-probabilities [n] of these inputs where somebody wants to know.
        self._rows: list[_Row] = []
        self._cache: Cache = []
        self._inputs = mx.array([], mx.uint32)
        self._logprobs: mx.array | None = None

    def add(self, job: Job) -> int:
        self._count += 1
        old = job.conversation
        before = () if old.cache is not None else old.tokens
        row = _Row(
            number=self._count,
            job=job,
            draw=_draw(self._loaded, job, self._greedy),
            processors=logits_processors(job.sampling),
            rest=[*before, *job.prompt][:-1],
            left=job.sampling.max_tokens,
        )
        if row.processors:
            row.tokens = mx.array([*old.tokens, *job.prompt][:-1], mx.uint32)
        self._waiting.append(row)
        return row.number

    def drop(self, number: int) -> None:
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for row in (row for rows, _ in self._reading for row in rows):
            if row.number == number:
                row.left = 0
        self._keep([place for place, row in enumerate(self._rows) if row.number != number])

    def step(self) -> list[Step]:
        with mx.stream(self._stream):
            self._read_on()
            return self._write() if self._rows else []

    def close(self) -> None:
        self._waiting.clear()
        self._reading = []
        self._keep([])
        if self._wired_before is not None:
            mx.synchronize(self._stream)
            mx.set_wired_limit(self._wired_before)
            self._wired_before = None

    def _read_on(self) -> None:
        """Read prompts, a part of each, and let those join that are read."""
        self._begin_to_read()
        reading, self._reading = self._reading, []
        for rows, read in reading:
            parts = [row.rest[:PREFILL] for row in rows]
            for row in rows:
                del row.rest[:PREFILL]
            if any(parts):
                read.prompt(parts)
            if any(row.rest for row in rows):
                self._reading.append((rows, read))
            else:
                self._join(rows, read)

    def _begin_to_read(self) -> None:
        """Take those that wait, as many as have a place; together those of about one length."""
        taken = sum(len(rows) for rows, _ in self._reading)
        free = min(self._places - len(self._rows), self._together) - taken
        groups: dict[tuple[int, int], list[_Row]] = {}
        for _ in range(min(free, len(self._waiting))):
            row = self._waiting.popleft()
            count = len(row.rest)
            # As many parts of each; and what is padded is less than what is read.
            groups.setdefault((-(-count // PREFILL), count.bit_length()), []).append(row)
        self._reading += [(rows, self._reader(rows)) for rows in groups.values()]

    def _reader(self, rows: list[_Row]) -> PromptProcessingBatch:
        caches = [
            make_prompt_cache(self._loaded.model) if cache is None else cache
            for cache in (row.job.conversation.cache for row in rows)
        ]
        for row, cache in zip(rows, caches, strict=True):
            # Until all is read, what stands there says only that it is wanted.
            row.mark = cache if row.job.needs_mark(cache) else None
        numbers = [row.number for row in rows]
        return PromptProcessingBatch(self._loaded.model, numbers, caches, prefill_step_size=PREFILL)

    def _join(self, rows: list[_Row], read: PromptProcessingBatch) -> None:
        for place, row in enumerate(rows):
            if row.mark is not None:
                row.mark = read.extract_cache(place)
                mx.eval([layer.state for layer in row.mark])
        last = mx.array([row.job.prompt[-1] for row in rows], mx.uint32)
        if self._rows:
            for layer, more in zip(self._cache, read.prompt_cache, strict=True):
                layer.extend(more)
            last = mx.concatenate([self._inputs, last])
        else:
            self._cache = read.prompt_cache
        self._inputs = last
        if self._logprobs is not None:
            self._logprobs = mx.concatenate([self._logprobs, mx.zeros(len(rows))])
        self._rows = [*self._rows, *rows]
        self._keep([place for place, row in enumerate(self._rows) if row.left])

    def _write(self) -> list[Step]:
        """Have the next tokens computed, and give those that are their inputs."""
        rows, inputs, logprobs = self._rows, self._inputs, self._logprobs
        final = self._compute()
        steps, going_on = [], []
        tokens: Any = inputs.tolist()
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.fresh:
                row.fresh = False
                if final is not None and row.job.states:
                    row.first = final[place, -1]
            else:
                steps.append(self._step_of(row, place, token, logprobs))
            if row.job.states and final is not None:
                row.final = final, place
            if not steps or steps[-1].number != row.number or steps[-1].ended is None:
                going_on.append(place)
        self._keep(going_on)
        return steps

    def _step_of(self, row: _Row, place: int, token: int, logprobs: mx.array | None) -> Step:
        job = row.job
        row.left -= 1
        wanted = logprobs[place : place + 1] if job.logprobs and logprobs is not None else None
        stopped = token in self._ends or token in job.ends
        if not stopped and row.left:
            return Step(row.number, token, logprob=wanted)
        states: tuple[mx.array, ...] = ()
        if row.first is not None and row.final is not None:
            predicted, at = row.final
            states = row.first, predicted[at, -1]
            mx.eval(states)  # not the states of all texts, for as long as one is kept
        return Step(
            row.number,
            token,
            "stop" if stopped else "length",
            [layer.extract(place) for layer in self._cache] if job.keep else None,
            row.mark,
            wanted,
            states,
        )

    def _compute(self) -> mx.array | None:
        """Run the model on all inputs; what it draws are the next ones.

        Returns:
            The final hidden states [n, 1, d], where somebody wants them.
        """
        rows, inputs = self._rows, self._inputs
        with finals(self._loaded, wanted=any(row.job.states for row in rows)) as seen:
            logits = self._loaded.model(inputs[:, None], cache=self._cache)[:, -1]
        if any(row.processors for row in rows):
            logits = mx.concatenate(
                [
                    _processed(row, inputs[k : k + 1], logits[k : k + 1])
                    for k, row in enumerate(rows)
                ]
            )
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        self._inputs = _drawn(rows, logprobs, self._greedy)
        self._logprobs = None
        if any(row.job.logprobs for row in rows):
            temperatures = mx.array([row.job.logprobs or 1.0 for row in rows])[:, None]
            vocab = self._loaded.vocab
            self._logprobs = token_logprobs(logprobs, self._inputs, temperatures, vocab)
        mx.async_eval(self._inputs, self._logprobs, seen)  # type: ignore[no-untyped-call]
        return seen[-1] if seen else None

    def _keep(self, places: list[int]) -> None:
        """Let all other texts leave."""
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in places]
        if not places:
            self._cache, self._inputs, self._logprobs = [], mx.array([], mx.uint32), None
            return
        for layer in self._cache:
            layer.filter(places)
        self._inputs = self._inputs[mx.array(places)]
        if self._logprobs is not None:
            self._logprobs = self._logprobs[mx.array(places)]


def _processed(row: _Row, token: mx.array, logits: mx.array) -> mx.array:
    """A row's logits [1, V] after its processors, which see all tokens so far."""
    if row.tokens is not None:
        row.tokens = mx.concatenate([row.tokens, token])
        for process in row.processors:
            logits = process(row.tokens, logits)
    return logits


def _drawn(rows: Sequence[_Row], logprobs: mx.array, likeliest: Draw) -> mx.array:
    """The tokens [n] that rows draw; in one call all that take the likeliest."""
    chosen = likeliest(logprobs)
    seeded_rows = [k for k, row in enumerate(rows) if row.draw is not likeliest]
    if not seeded_rows:
        return chosen
    own = [rows[k].draw(logprobs[k : k + 1]) for k in seeded_rows]
    chosen[mx.array(seeded_rows)] = mx.concatenate(own).astype(chosen.dtype)
    return chosen


class _AloneLane:
    """One text after the other: with a draft, or of a model that batches do not get right."""

    def __init__(self, loaded: Loaded):
        self._loaded, self._greedy = loaded, greedy(loaded)
        self._waiting: deque[tuple[int, Job]] = deque()
        self._running: tuple[int, Iterator[Step]] | None = None
        self._count = 0

    def add(self, job: Job) -> int:
        self._count += 1
        self._waiting.append((self._count, job))
        return self._count

    def drop(self, number: int) -> None:
        self._waiting = deque(pair for pair in self._waiting if pair[0] != number)
        if self._running is not None and self._running[0] == number:
            self._running = None

    def step(self) -> list[Step]:
        if self._running is None:
            if not self._waiting:
                return []
            number, job = self._waiting.popleft()
            self._running = number, self._write(number, job)
        step = next(self._running[1])
        if step.ended is not None:
            self._running = None
        return [step]

    def close(self) -> None:
        self._waiting.clear()
        self._running = None

    def _write(self, number: int, job: Job) -> Iterator[Step]:
        options = GenerateOptions(keep=job.keep, mark=job.mark, states=job.states)
        text = Text(job.conversation, job.prompt, job.sampling, options, job.ends)
        draw = _draw(self._loaded, job, self._greedy)
        numbers = draw if isinstance(draw, Seeded) else None
        return written_alone(self._loaded, text, draw, numbers, job.logprobs, number)
