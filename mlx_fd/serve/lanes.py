"""One model and all texts that it is writing: a batch that texts join and leave at any step."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.models.conversation import Cache, Conversation
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import (
    Draw,
    Sampling,
    drawn_alone,
    logits_processors,
    read_alone,
    token_logprobs,
)
from mlx_fd.serve.drawing import greedy, seeded

# Prompts that are read together, as mlx-lm has it.
_READ_TOGETHER = 8


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
        logprobs: whether the log-probabilities of its tokens are wanted.
        ends: tokens that end it beside those that end a turn.
        raw: whether all of it is text, marks of thoughts too.
    """

    conversation: Conversation
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    keep: bool = False
    streams: bool = False
    logprobs: bool = False
    ends: frozenset[int] = frozenset()
    raw: bool = False


@dataclass(frozen=True)
class Step:
    """One token of a text.

    Attributes:
        number: the text's, as :meth:`Lane.add` gave it.
        token: its id.
        ended: ``"stop"``: the model ended it; ``"length"``: the limit did; ``None``: it goes on.
        cache: the model's state after an ended text's last token.
        logprob: where it is wanted, the token's log-probability [1] at temperature 1, which the
            device may still compute: whoever reads it at once waits for the next token, too.
    """

    number: int
    token: int
    ended: str | None = None
    cache: Cache | None = None
    logprob: mx.array | None = None


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


def open_lane(loaded: Loaded, places: int) -> Lane:
    """A lane of a model.

    Args:
        loaded: the model.
        places: texts that it writes side by side; others wait.
    """
    return _BatchLane(loaded, places) if loaded.batched else _AloneLane(loaded)


def _draw(loaded: Loaded, sampling: Sampling, likeliest: Draw) -> Draw:
    return seeded(loaded, sampling) if sampling.temperature else likeliest


class _BatchLane:
    """On mlx-lm's batched generator, which joins prompts to the batch that runs."""

    def __init__(self, loaded: Loaded, places: int):
        self._loaded, self._greedy = loaded, greedy(loaded)
        self._generator = BatchGenerator(
            loaded.model,
            sampler=self._greedy,
            completion_batch_size=places,
            prefill_batch_size=min(places, _READ_TOGETHER),
        )
        self._left: set[int] = set()
        self._measured: set[int] = set()

    def add(self, job: Job) -> int:
        old, prompt = job.conversation, job.prompt
        cached = old.cache is not None
        [number] = self._generator.insert(
            [list(prompt) if cached else [*old.tokens, *prompt]],
            max_tokens=[job.sampling.max_tokens],
            caches=[old.cache if cached else make_prompt_cache(self._loaded.model)],
            all_tokens=[list(old.tokens) if cached else []],
            samplers=[_draw(self._loaded, job.sampling, self._greedy)],
            logits_processors=[logits_processors(job.sampling)],
            stop_sequences=[self._stops(job)],
        )
        self._left.add(number)
        if job.logprobs:
            self._measured.add(number)
        return int(number)

    def _stops(self, job: Job) -> StopSequences:
        return StopSequences(
            [[token] for token in {*self._loaded.tokenizer.eos_token_ids, *job.ends}]
        )

    def drop(self, number: int) -> None:
        if number in self._left:
            self._left.remove(number)
            self._measured.discard(number)
            self._generator.remove([number])

    def step(self) -> list[Step]:
        if not self._left:
            return []
        _, responses = self._generator.next()
        measured = self._logprobs([one for one in responses if one.uid in self._measured])
        steps = []
        for one in responses:
            if one.finish_reason is not None:
                self._left.discard(one.uid)
                self._measured.discard(one.uid)
            steps.append(
                Step(one.uid, one.token, one.finish_reason, one.prompt_cache, measured.get(one.uid))
            )
        return steps

    def _logprobs(self, responses: list[Any]) -> dict[int, mx.array]:
        if not responses:
            return {}
        rows = mx.stack([one.logprobs for one in responses])
        tokens = [one.token for one in responses]
        values = mx.split(token_logprobs(rows, tokens, 1.0, self._loaded.vocab), len(tokens))
        mx.async_eval(values)  # type: ignore[no-untyped-call]
        return {one.uid: value for one, value in zip(responses, values, strict=True)}

    def close(self) -> None:
        self._left.clear()
        self._measured.clear()
        self._generator.close()


class _AloneLane:
    """One text after the other, for models that mlx-lm's batched generator does not get right."""

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
        old, loaded = job.conversation, self._loaded
        cache: Any = copy.deepcopy(old.cache)
        before, start = [*old.tokens, *job.prompt], list(job.prompt)
        if cache is None:
            cache, start = make_prompt_cache(loaded.model), before
        read_alone(loaded, cache, start[:-1])
        draw = _draw(loaded, job.sampling, self._greedy)
        made = drawn_alone(loaded, cache, before, draw, logits_processors(job.sampling))
        for count, (token, rows) in enumerate(made, 1):
            logprob = token_logprobs(rows, [token], 1.0, loaded.vocab) if job.logprobs else None
            stopped = token in loaded.tokenizer.eos_token_ids or token in job.ends
            if not stopped and count < job.sampling.max_tokens:
                yield Step(number, token, logprob=logprob)
                continue
            if job.keep:
                read_alone(loaded, cache, [token])
                mx.eval([layer.state for layer in cache])
            yield Step(number, token, "stop" if stopped else "length", cache, logprob)
            return
