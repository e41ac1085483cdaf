"""Works that each wait for a reply now and then, carried on together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

Question = TypeVar("Question")
Reply = TypeVar("Reply")
Result = TypeVar("Result")


def in_step(
    works: Sequence[Generator[Question, Reply, Result]],
    answer: Callable[[list[Question]], Sequence[Reply]],
    rank: Callable[[Question], int] = lambda question: 0,
) -> list[Result]:
    """Carry works on round by round: in each, all that come first are answered together.

    Args:
        works: each yields questions, and is sent the replies.
        answer: replies to a round's questions, in the order of their works.
        rank: of those that wait, the ones with the least rank come first.

    Returns:
        What each work ended in.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Question] = {}

    def go_on(place: int, reply: Any) -> None:
        try:
            waiting[place] = works[place].send(reply)
        except StopIteration as end:
            results[place] = end.value

    for place in range(len(works)):
        go_on(place, None)
    while waiting:
        least = min(map(rank, waiting.values()))
        places = [place for place in sorted(waiting) if rank(waiting[place]) == least]
        replies = answer([waiting.pop(place) for place in places])
        for place, reply in zip(places, replies, strict=True):
            go_on(place, reply)
    return [results[place] for place in range(len(works))]
