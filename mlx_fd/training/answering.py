"""The temperature of the answers that are judged: it rises while there are no errors to learn from.

A student learns little about errors from answers that are nearly all right. Pure: state in, new
state out; the state is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_fd.config import GenerationOptions

# Verdicts that a step is decided by, and what it adds to the temperature or takes away.
ENOUGH, STEP = 32, 0.1
# The share of right ones from which nearly all are right, and up to which nearly all are wrong.
NEARLY_ALL, NEARLY_NONE = 0.85, 0.15


@dataclass(frozen=True)
class Answering:
    """How the answers that are judged have been so far.

    Attributes:
        steps: times :data:`STEP` that the temperature is above ``answer_temperature``.
        right: answers that the expert called right since the last decision.
        judged: answers that it judged since then.
    """

    steps: int = 0
    right: int = 0
    judged: int = 0


def warmed(options: GenerationOptions, state: Answering) -> GenerationOptions:
    """The options with the temperature as it is now."""
    if not state.steps:
        return options
    temperature = options.answer_temperature + STEP * state.steps
    return replace(options, answer_temperature=min(temperature, options.max_answer_temperature))


def observe(
    state: Answering, scores: Sequence[float | None], options: GenerationOptions
) -> Answering:
    """Take note of a batch's verdicts: up while nearly all are right, back while nearly all wrong.

    Args:
        state: before the batch.
        scores: the expert's, of the answers drawn at this temperature; ``None`` says nothing.
        options: where the temperature begins, and how far it may rise.
    """
    known = [score > 0 for score in scores if score is not None]
    state = replace(state, right=state.right + sum(known), judged=state.judged + len(known))
    if state.judged < ENOUGH:
        return state
    share, steps = state.right / state.judged, state.steps
    room = options.max_answer_temperature - options.answer_temperature - STEP * steps
    if share >= NEARLY_ALL and room > 1e-9:
        steps += 1
    elif share <= NEARLY_NONE and steps:
        steps -= 1
    return Answering(steps)
