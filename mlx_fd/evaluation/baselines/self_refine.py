"""Self-Refine (Madaan et al., arXiv 2303.17651): generate, criticise, refine, with all history."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.evaluation.baselines import register_system
from mlx_fd.evaluation.baselines.critics import (
    Criticised,
    criticise,
    feedback_stage,
    good_enough,
    revise,
)
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, System, Trial, trial

if TYPE_CHECKING:
    from mlx_fd.feedback.asking import OnTokens
    from mlx_fd.feedback.stages import Answered

ATTEMPTS = 4
"""Feedbacks at most, as in their code for GSM8K."""


def self_refine(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """The expert judges and refines until its score says that the answer is right.

    One growing conversation: each refinement sees all earlier attempts and feedbacks. Where their
    code looks for a phrase, a score that reaches ``target_score`` ends it.
    """
    ended: dict[int, Trial] = {}
    places = list(range(len(answered)))
    first_scores: dict[int, float | None] = {}
    turns: list[dict[str, str]] = [{} for _ in answered]
    last, todo = "answer", list(answered)
    for attempt in range(1, ATTEMPTS + 1):
        stage = feedback_stage(f"feedback_{attempt}", setting.pair.expert)
        judged = criticise(setting, todo, [stage], seeds, on_tokens)
        open_places: list[int] = []
        wanting: list[Criticised] = []
        for place, item in zip(places, judged, strict=True):
            turns[place].update(item.turns)
            score = first_scores.setdefault(place, item.feedback.written_score)
            if good_enough(item.feedback, setting.episode):
                ended[place] = trial(
                    setting, item.answered.answer, item.usage, turns[place], last, score
                )
            else:
                open_places.append(place)
                wanting.append(item)
        last, places = f"refine_{attempt}", open_places
        refined = revise(setting, wanting, last, seeds, on_tokens, keep=attempt < ATTEMPTS)
        for place, item in zip(places, refined, strict=True):
            turns[place].update(item.turns)
        todo = [
            dataclasses.replace(item.answered, conversation=item.conversation, usage=item.usage)
            for item in refined
        ]
    for place, one in zip(places, todo, strict=True):
        ended[place] = trial(
            setting, one.answer, one.usage, turns[place], last, first_scores[place]
        )
    return [ended[place] for place in range(len(answered))]


register_system(
    System(
        name="self-refine",
        help="the expert criticises and refines until it is content (arXiv 2303.17651)",
        order=50,
        label="Self-Refine",
        begins_with="first",
        amateur=None,
        run=self_refine,
    )
)
