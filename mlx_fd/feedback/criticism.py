"""Feedback that a model writes by itself: its request, its text, and the score head's score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_fd.models.conversation import Conversation, forward
from mlx_fd.models.generation import (
    Writing,
    after_thought,
    followup_prompt,
    generate,
    replying,
    think,
    thought_before,
    turn,
    with_thought,
)
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn
from mlx_fd.problems import parsing
from mlx_fd.problems.prompts import FEEDBACK_OPENING, Feedback, feedback_prompt


def feedback_request(loaded: Loaded, prompt: str = "") -> tuple[int, ...]:
    """Tokens of a request for feedback, up to and with the reply's first word.

    Args:
        loaded: whose template and tokens.
        prompt: what is asked; empty: the role's own prompt.
    """
    begun = loaded.tokenizer.encode(FEEDBACK_OPENING, add_special_tokens=False)
    return (*followup_prompt(loaded, prompt or feedback_prompt()), *begun)


def parsed(turn: Turn) -> Feedback:
    """What a model wrote after :func:`feedback_request`; nothing where its thought was cut off."""
    if not turn.text:
        return Feedback("", None, turn.tokens, turn.opening)
    read = parsing.parse_feedback(f"{FEEDBACK_OPENING} {turn.text}", turn.tokens)
    return dataclasses.replace(read, opening=turn.opening)


@dataclass(frozen=True)
class Criticism:
    """A feedback that was written by itself.

    Attributes:
        turn: the feedback, with what was thought before it.
        prompt: all tokens before the feedback, the thought among them.
        before: a conversation that the prompt begins with, but for its last token at least.
    """

    turn: Turn
    prompt: tuple[int, ...]
    before: Conversation = field(default_factory=Conversation)


def criticisms(
    loaded: Loaded,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    options: GenerateOptions,
) -> list[Criticism]:
    """Feedback after each of some prompts, which end as :func:`feedback_request` does.

    Args:
        loaded: who writes.
        prompts: all tokens before each.
        sampling: how to draw.
        options: whether caches are used, and who is told of tokens.
    """
    thoughts = think(loaded, prompts, sampling, options)
    prompts = [
        with_thought(loaded, prompt, thought.opening if thought else ())
        for prompt, thought in zip(prompts, thoughts, strict=True)
    ]
    turns = generate(
        replying(loaded),
        [Conversation()] * len(prompts),
        prompts,
        sampling,
        dataclasses.replace(options, keep=False, states=True),
    )
    return [
        Criticism(after_thought(turn, thought), prompt)
        for turn, thought, prompt in zip(turns, thoughts, prompts, strict=True)
    ]


def criticism(
    loaded: Loaded, prompt: tuple[int, ...], sampling: Sampling, options: GenerateOptions
) -> Writing[Criticism]:
    """What :func:`criticisms` does, of one prompt; as :func:`mlx_fd.models.generation.turn`."""
    thought = yield from thought_before(loaded, prompt, sampling, options)
    prompt = with_thought(loaded, prompt, thought.opening if thought else ())
    going_on = dataclasses.replace(options, keep=False, states=True)
    said = yield from turn(replying(loaded), Conversation(), prompt, sampling, going_on)
    return Criticism(after_thought(said, thought), prompt)


def head_score(
    student: Student,
    student_lm: Loaded,
    criticism: Criticism,
) -> float:
    """The score of the student's head on an answer that it gave feedback on.

    Args:
        student: the student.
        student_lm: its language model, which reads the feedback where the states that it was
            written from are not known.
        criticism: its feedback.
    """
    at_end, turn, before = student.scores_at_end, criticism.turn, criticism.before
    if turn.states:
        return float(student.score(turn.states[at_end]))
    text = (*criticism.prompt, *(turn.tokens[:-1] if at_end else ()))
    seen = forward(student_lm, before, text[len(before.tokens) :])
    return float(student.score(seen.final[0, -1]))
