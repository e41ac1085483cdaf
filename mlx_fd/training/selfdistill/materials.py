"""What contexts and critics are given: attempts at problems, and what there is beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_fd.problems import Problem
from mlx_fd.problems.sources import truth_about
from mlx_fd.training.selfdistill.playbook import Playbook

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded

_BLANK_LINES = re.compile(r"\n\s*\n+")


@dataclass(frozen=True)
class Attempt:
    """What the student wrote on a problem.

    Attributes:
        problem: the problem.
        question: its text as the student read it, with noise if there was any.
        tokens: ids that were written, with the end-of-turn token where it came.
        text: the same without that token.
        final: what it arrived at, ``None`` where that could not be read.
        correct: whether it is the problem's answer; ``None`` where nobody knows.
        logprobs: log-probability of each token when it was drawn, as long as ``tokens``.
        own: whether the student wrote it, and not the expert.
        opening: ids of the thought before it, with its marks; empty where there was none.
        thought: the same as text.
    """

    problem: Problem
    question: str
    tokens: tuple[int, ...]
    text: str
    final: str | None
    correct: bool | None
    logprobs: tuple[float, ...] = ()
    opening: tuple[int, ...] = ()
    thought: str = ""
    own: bool = True


@dataclass(frozen=True)
class Materials:
    """What contexts are made of, beside the attempts.

    Attributes:
        critic: a frozen model that writes critiques, feedback and reflections.
        truth: take the true critique instead: an upper bound for every critic. Only for problems
            whose source knows the truth about any answer.
        critic_sees: ``"reference"``: the critic rewrites with a reference solution before it, as
            published; ``"problem"``: it judges by itself, in the loop's own roles (feedback, then
            revision), which is what the models of this package know.
        critic_tokens: most tokens that the critic writes on one attempt.
        reference_style: ``"solution"``: a reference is the problem's solution as it stands;
            ``"prose"``: that of a generated problem is told in sentences, as another author would,
            where attempts have marked steps.
        demonstrations: by problem id, what is shown as demonstration; the problem's solution where
            there is none.
        playbook: what earlier rounds left, for reflections.
        most_wrong: most wrong hints for one attempt.
        seed: of the draws.
    """

    critic: Loaded | None = None
    truth: bool = False
    critic_sees: str = "reference"
    critic_tokens: int = 256
    reference_style: str = "solution"
    demonstrations: Mapping[str, str] = field(default_factory=dict)
    playbook: Playbook = field(default_factory=Playbook)
    most_wrong: int = 4
    seed: int = 0


def quoted(text: str) -> str:
    """A model's text without blank lines, so that it cannot pass for another part of a message."""
    return _BLANK_LINES.sub("\n", text.strip())


def reference_of(problem: Problem, materials: Materials) -> str:
    """A problem's reference solution, in the style that was chosen."""
    truth = truth_about(problem) if materials.reference_style == "prose" else None
    return problem.solution if truth is None or truth.prose is None else truth.prose(problem)
