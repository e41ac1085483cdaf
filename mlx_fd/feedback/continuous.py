"""Episodes that do not wait for each other: each goes on as soon as its own turn ends.

Each model has a running batch (:mod:`mlx_fd.models.lanes`) that turns join and leave. One model
writes till nothing waits for it, then the next; of the turns that wait, those go first after which
their model has most turns of the same episode to write, as the last ones to end would write alone.

Every turn draws by a seed of its own. So its text depends on nobody who writes beside it, but for
the last bit of a sum, and everything is in an order that is the same each time.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_fd.feedback.asking import Ask, Group, Reply
from mlx_fd.models import metering
from mlx_fd.models.generation import Writing
from mlx_fd.models.lanes import Job, open_lane
from mlx_fd.models.loading import Loaded
from mlx_fd.models.merging import fused
from mlx_fd.models.writing import Drawn, Step, Text, Turn, turn_of

# How many turns a model still has to write of an episode's half from a step on, where it is not 1.
_TURNS = {"answer": 2, "expert_solution": 3, "merge": 4, "revise": 3, "critique": 2}


def ask_continuously(groups: Sequence[Group], places: int) -> list[list[Any]]:
    """Carry parts of episodes on, each for itself.

    Args:
        groups: the parts; the weights of all models stay as they are meanwhile.
        places: texts that a model writes side by side.

    Returns:
        What each came to, group by group.
    """
    with metering.part(metering.WRITING), ExitStack() as stack:
        return _Scheduler(groups, places, stack).run()


@dataclass
class _Episode:
    """A part of an episode.

    Attributes:
        group: whose.
        key: the group's place and the episode's in it.
        replies: to what it asked for last, as they come.
        result: what it came to.
    """

    group: Group
    key: tuple[int, int]
    replies: list[Reply | None] = field(default_factory=list)
    result: Any = None


@dataclass
class _Turn:
    """A turn that is being written.

    Attributes:
        episode: whose.
        place: among those that the episode asked for together.
        ask: what was asked for.
        work: what asks for its texts, one after the other.
        texts: how many that were so far.
        text: the one that waits or is being written.
        tokens: its tokens so far.
        logprobs: of them, [1] each, where they are wanted.
        seconds: the turn's share of the time.
    """

    episode: _Episode
    place: int
    ask: Ask
    work: Writing[Reply]
    texts: int = 0
    text: Text | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[int, ...]:
        """Its place among those that wait: the least goes first."""
        return -_TURNS.get(self.ask.step, 1), *self.episode.key, self.place


class _Model:
    """A model's running batch, and the turns that wait for a place in it."""

    def __init__(self, loaded: Loaded, places: int, stack: ExitStack):
        stack.enter_context(fused(loaded.model))
        self.loaded, self._places = loaded, places
        self._lane = open_lane(loaded, places, together=places)
        stack.callback(self._lane.close)
        self._waiting: list[tuple[tuple[int, ...], _Turn]] = []
        self._running: dict[int, _Turn] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    def wait(self, turn: _Turn) -> None:
        """Let a turn's next text wait."""
        heapq.heappush(self._waiting, (turn.key, turn))

    def step(self) -> Iterator[tuple[_Turn, Drawn]]:
        """Write a token of each text; the texts that ended."""
        begin = time.perf_counter()
        while self._waiting and len(self._running) < self._places:
            _, turn = heapq.heappop(self._waiting)
            self._running[self._lane.add(_job(turn))] = turn
        steps = self._lane.step()
        share = (time.perf_counter() - begin) / len(self._running)
        for turn in self._running.values():
            turn.seconds += share
        counts: Counter[tuple[int, str]] = Counter()
        ended = []
        for one in steps:
            turn = self._running[one.number]
            turn.tokens.append(one.token)
            if one.logprob is not None:
                turn.logprobs.append(one.logprob)
            counts[turn.episode.key[0], turn.ask.step] += 1
            if one.ended is not None:
                ended.append((turn, one))
        told = {turn.episode.key[0]: turn.episode.group for turn in self._running.values()}
        for (group, step), count in counts.items():
            told[group].on_tokens(step, count)
        for turn, one in ended:
            del self._running[one.number]
            yield turn, _drawn(turn, one)


def _job(turn: _Turn) -> Job:
    """What a lane is given of a turn's text."""
    text, episode = turn.text, turn.episode
    assert text is not None
    # A seed for each text: of a thought and of its reply, of each of several solutions.
    name = f"{turn.ask.step}/{episode.key[1]}/{turn.place}/{turn.texts}"
    sampling, options = text.sampling, text.options
    return Job(
        text.conversation,
        text.prompt,
        dataclasses.replace(sampling, seed=episode.group.seeds(name)),
        ends=text.ends,
        keep=options.keep,
        mark=options.mark,
        logprobs=(sampling.temperature or 1.0) if options.logprobs else 0.0,
        states=options.states,
    )


def _drawn(turn: _Turn, last: Step) -> Drawn:
    """A turn's text once it has ended, with nothing left to compute."""
    logprobs: Any = mx.concatenate(turn.logprobs).tolist() if turn.logprobs else ()
    if last.cache is not None:
        # Lazy slices would hold the whole batch's cache of this very step.
        mx.eval([layer.state for layer in last.cache])
    return Drawn(
        tuple(turn.tokens),
        last.ended == "stop",
        last.cache,
        last.mark,
        tuple(logprobs),
        last.states,
    )


class _Scheduler:
    """Who writes next."""

    def __init__(self, groups: Sequence[Group], places: int, stack: ExitStack):
        self._places, self._stack = places, stack
        self._models: dict[int, _Model] = {}
        self._episodes = [
            [_Episode(group, (at, place)) for place in range(len(group.works))]
            for at, group in enumerate(groups)
        ]

    def run(self) -> list[list[Any]]:
        for of_group in self._episodes:
            for episode in of_group:
                self._go_on(episode, None)
        while (model := next(filter(None, self._models.values()), None)) is not None:
            while model:
                for turn, drawn in model.step():
                    assert turn.text is not None
                    self._write(turn, turn_of(model.loaded, turn.text, drawn))
        return [[episode.result for episode in of_group] for of_group in self._episodes]

    def _go_on(self, episode: _Episode, replies: Any) -> None:
        """Let an episode ask for its next turns."""
        work = episode.group.works[episode.key[1]]
        try:
            asks = work.send(replies)
        except StopIteration as end:
            episode.result = end.value
            return
        episode.replies = [None] * len(asks)
        for place, ask in enumerate(asks):
            self._write(_Turn(episode, place, ask, ask.writing()), None)

    def _write(self, turn: _Turn, made: Turn | None) -> None:
        """Let a turn ask for its next text; where it was the last one, the episode goes on."""
        try:
            turn.text = turn.work.send(made)  # type: ignore[arg-type]
        except StopIteration as end:
            episode: _Episode = turn.episode
            episode.replies[turn.place] = dataclasses.replace(end.value, seconds=turn.seconds)
            if None not in episode.replies:
                self._go_on(episode, episode.replies)
            return
        turn.texts += 1
        turn.tokens, turn.logprobs = [], []
        loaded = turn.ask.loaded
        if id(loaded.model) not in self._models:
            self._models[id(loaded.model)] = _Model(loaded, self._places, self._stack)
        self._models[id(loaded.model)].wait(turn)
