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
    from mlx_fd.feedback.episode import Draft, Progress

ATTEMPTS = 4
"""Feedbacks at most, as in their code for GSM8K."""


def self_refine(
    setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    """The expert judges and refines until its score says that the answer is right.

    One growing conversation: each refinement sees all earlier attempts and feedbacks. Where their
    code looks for a phrase, a score that reaches ``target_score`` ends it.
    """
    tokenizer = setting.pair.expert.tokenizer
    ended: dict[int, Trial] = {}
    places = list(range(len(drafts)))
    first_scores: dict[int, float | None] = {}
    turns: list[dict[str, str]] = [{} for _ in drafts]
    last, todo = "answer", list(drafts)
    for attempt in range(1, ATTEMPTS + 1):
        stage = feedback_stage(f"feedback_{attempt}", tokenizer)
        judged = criticise(setting, todo, [stage], seeds, progress)
        open_places: list[int] = []
        wanting: list[Criticised] = []
        for place, item in zip(places, judged, strict=True):
            turns[place].update(item.turns)
            score = first_scores.setdefault(place, item.feedback.score)
            if good_enough(item.feedback, setting.episode):
                ended[place] = trial(setting, item.draft, turns[place], last, score)
            else:
                open_places.append(place)
                wanting.append(item)
        last, places = f"refine_{attempt}", open_places
        refined = revise(setting, wanting, last, seeds, progress, keep=attempt < ATTEMPTS)
        for place, item in zip(places, refined, strict=True):
            turns[place].update(item.turns)
        todo = [dataclasses.replace(item.draft, after_answer=item.conversation) for item in refined]
    for place, draft in zip(places, todo, strict=True):
        ended[place] = trial(setting, draft, turns[place], last, first_scores[place])
    return [ended[place] for place in range(len(drafts))]


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
