"""Turns that episodes ask for, and how they are written: all of one step together.

What an episode does is written as a generator that yields what it asks (:class:`Ask`) and is sent
the replies. :mod:`mlx_fd.feedback.continuous` is the other way to carry episodes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_fd.feedback.criticism import criticism, criticisms
from mlx_fd.feedback.stages import Usage
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import Writing, generate, turn
from mlx_fd.models.loading import Loaded
from mlx_fd.models.stepping import in_step
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn

Result = TypeVar("Result")

OnTokens = Callable[[str, int], None]
"""Called with the step's name and how many tokens were just written or learned from."""
Seeds = Callable[[str], int]
"""Gives the seed of a step's draws, by the step's name."""

# The steps of an episode, in the order in which all that wait go on.
_STEPS = (
    *("answer", "student_feedback", "student_solution", "expert_feedback", "privileged_feedback"),
    *("student_feedback_again", "expert_solution", "merge", "revise", "critique", "final"),
)
_ORDER = {step: place for place, step in enumerate(_STEPS)}


@dataclass(frozen=True)
class Ask:
    """A turn that an episode waits for.

    Attributes:
        loaded: who is to write it.
        step: the step's name.
        conversation: what was said so far.
        prompt: the new tokens.
        sampling: how to draw; whoever carries the episode on gives the seed.
        options: what is kept.
        alone: it is a feedback by itself, as :func:`mlx_fd.feedback.criticism.criticisms` has it
            written; there is no conversation before.
    """

    loaded: Loaded
    step: str
    conversation: Conversation
    prompt: tuple[int, ...]
    sampling: Sampling
    options: GenerateOptions
    alone: bool = False

    def writing(self) -> Writing[Reply]:
        """The work of it: what asks for the turn's texts, one after the other."""
        if self.alone:
            said = yield from criticism(self.loaded, self.prompt, self.sampling, self.options)
            return Reply(said.turn, said.prompt)
        made = yield from turn(
            self.loaded, self.conversation, self.prompt, self.sampling, self.options
        )
        return Reply(made)


@dataclass(frozen=True)
class Reply:
    """A turn that was asked for.

    Attributes:
        turn: the turn.
        prompt: of a feedback by itself, all tokens before it, the thought among them.
        seconds: its share of the time.
    """

    turn: Turn
    prompt: tuple[int, ...] = ()
    seconds: float = 0.0


Turns = Generator[tuple[Ask, ...], Sequence[Reply], Result]
"""A part of an episode: what it yields together is of one step, and may be written together."""


def asked(ask: Ask) -> Turns[Reply]:
    """The reply to one turn that is asked for."""
    (reply,) = yield (ask,)
    return reply


def ask_in_step(works: Sequence[Turns[Result]], seeds: Seeds, on_tokens: OnTokens) -> list[Result]:
    """Carry parts of episodes on together: each step's turns are one batch.

    Args:
        works: the parts.
        seeds: of each step's draws, which are one sequence for all its turns.
        on_tokens: called for every token.

    Returns:
        What each came to, in order.
    """
    return in_step(
        works,
        functools.partial(_ask_together, seeds, on_tokens),
        lambda asks: _ORDER.get(asks[0].step, 0),
    )


def _ask_together(
    seeds: Seeds, on_tokens: OnTokens, wanted: Sequence[tuple[Ask, ...]]
) -> list[list[Reply]]:
    """The replies to turns of one step; of several for one episode, all first ones come first."""
    most = max(map(len, wanted))
    places = [(at, k) for k in range(most) for at, asks in enumerate(wanted) if k < len(asks)]
    asks = [wanted[at][k] for at, k in places]
    first, begin = asks[0], time.perf_counter()
    sampling = dataclasses.replace(first.sampling, seed=seeds(first.step))
    options = dataclasses.replace(
        first.options, on_token=lambda count: on_tokens(first.step, count)
    )
    if first.alone:
        found = criticisms(first.loaded, [one.prompt for one in asks], sampling, options)
        made = [Reply(one.turn, one.prompt) for one in found]
    else:
        turns = generate(
            first.loaded,
            [one.conversation for one in asks],
            [one.prompt for one in asks],
            sampling,
            options,
        )
        made = [Reply(one) for one in turns]
    share = (time.perf_counter() - begin) / len(made)
    replies: list[list[Reply]] = [[] for _ in wanted]
    for (at, _), one in zip(places, made, strict=True):
        replies[at].append(dataclasses.replace(one, seconds=share))
    return replies


@dataclass(frozen=True)
class Group:
    """Parts of a batch's episodes.

    Attributes:
        works: one of each episode.
        seeds: of the draws, by the step's name.
        on_tokens: called for every token.
    """

    works: Sequence[Turns[Any]]
    seeds: Seeds
    on_tokens: OnTokens


def derive_seed(seed: int, batch: int, step: str) -> int:
    """The seed of one step's draws: it depends on nothing that came before."""
    digest = hashlib.sha256(f"{seed}/{batch}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def generate_step(
    loaded: Loaded,
    step: str,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_tokens: OnTokens,
    options: GenerateOptions,
) -> tuple[list[Turn], list[Usage]]:
    """One step outside of an episode: a turn in each conversation.

    Args:
        loaded: who writes.
        step: the step's name.
        conversations: what was said so far.
        prompts: the new tokens of each.
        sampling: how to draw.
        on_tokens: called for every token.
        options: what is kept.

    Returns:
        The turns and what each took, in order.
    """
    begin = time.perf_counter()
    turns = generate(
        loaded,
        conversations,
        prompts,
        sampling,
        dataclasses.replace(options, on_token=lambda count: on_tokens(step, count)),
    )
    share = (time.perf_counter() - begin) / max(len(turns), 1)
    return turns, [usage_of(step, turn, share) for turn in turns]


def usage_of(step: str, turn: Turn, seconds: float) -> Usage:
    """What a step took whose text is a turn."""
    return Usage(
        tokens={step: turn.written},
        prefilled={step: turn.prefilled},
        seconds={step: seconds},
        capped=() if turn.finished else (step,),
        thoughts={step: turn.thought} if turn.thought else {},
        closed=(step,) if turn.closed else (),
        accepted={} if turn.accepted is None else {step: turn.accepted},
    )
