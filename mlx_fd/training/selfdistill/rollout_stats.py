"""Texts that the student learns from, and all that is held constant of them meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_fd.losses.teacher import TopK
from mlx_fd.models import ranks
from mlx_fd.models.generation import first_prompt, with_thought
from mlx_fd.models.loading import Loaded
from mlx_fd.training.selfdistill import objectives

# Likeliest tokens that student and teacher are asked whether they share.
OVERLAP_TOP_K = 10


@dataclass(frozen=True)
class Text:
    """Tokens before a text, and the T tokens of the text.

    Attributes:
        prompt: all that is read before it, a thought among it.
        target: the text.
        opening: the tokens of that thought, with its marks.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    opening: tuple[int, ...] = ()


def text_after(
    loaded: Loaded, message: str, target: tuple[int, ...], opening: tuple[int, ...]
) -> Text:
    """A text as the reply to a user's first message, after the thought that it came from."""
    prompt = with_thought(loaded, first_prompt(loaded, message), opening)
    return Text(prompt, target, opening)


@dataclass(frozen=True)
class RolloutStats:
    """All that is held constant of one text while the student learns from it.

    Attributes:
        text: as the student reads it.
        group: which problem it is an attempt at, counted from 0.
        reward: 1 for a right answer, 0 for a wrong one and where nobody knows.
        finished: whether it ended itself, and not at the token limit.
        old: [T], log-probabilities when the tokens were drawn.
        now: [T], the student's, at the beginning of the update.
        entropy: [T], of the student's distributions.
        teacher: [T], the self-teacher's; ``None``: this text teaches nothing.
        targets: the self-teacher's distributions, where they are matched: its final hidden states
            [T, d], or its logits of some tokens.
        wrong: [K, T], the self-teacher's with wrong hints; ``None``: there are none.
        reference: [T], the base model's, where the loss needs them.
        likely: whether its own likelihood is raised, where that is the objective.
        own: whether this rank reads it for its gradient; another one's has no ``targets``.
        overlap: [T], of the teacher's :data:`OVERLAP_TOP_K` likeliest tokens the share that are
            among the student's; ``None`` without a teacher.
        reverse_kl: [T], KL(student || teacher) in nats; likewise.
    """

    text: Text
    group: int
    reward: float
    finished: bool
    old: mx.array
    now: mx.array
    entropy: mx.array
    teacher: mx.array | None = None
    targets: mx.array | TopK | None = None
    wrong: mx.array | None = None
    reference: mx.array | None = None
    likely: bool = False
    overlap: mx.array | None = None
    reverse_kl: mx.array | None = None
    own: bool = True

    @property
    def advantages(self) -> mx.array | None:
        """A_t = log pi_T(y_t) - log pi_S(y_t), [T]."""
        if self.teacher is None:
            return None
        return objectives.token_advantages(self.teacher, self.now)


# What of a text's numbers decides what its tokens count, and is shown.
_GATHERED = ("old", "now", "entropy", "teacher", "wrong", "reference", "overlap", "reverse_kl")


def gather_stats(own: Sequence[RolloutStats]) -> list[RolloutStats]:
    """Those of all ranks (:mod:`mlx_fd.models.ranks`), rank 0's first.

    What a text is matched to stays with the rank that reads it.
    """
    if ranks.size() == 1:
        return list(own)
    rows = ranks.gather(
        [
            (vars(item.text), item.group, item.reward, item.finished, item.likely, ranks.index())
            for item in own
        ]
    )
    arrays = ranks.gather_arrays(
        [
            {name: array for name in _GATHERED if (array := getattr(item, name)) is not None}
            for item in own
        ]
    )
    mine = iter(own)
    return [
        next(mine)
        if rank == ranks.index()
        else RolloutStats(
            text=Text(**{name: tuple(tokens) for name, tokens in text.items()}),
            group=group,
            reward=reward,
            finished=finished,
            likely=likely,
            own=False,
            **named,
        )
        for (text, group, reward, finished, likely, rank), named in zip(rows, arrays, strict=True)
    ]
