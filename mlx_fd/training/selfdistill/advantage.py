"""Where a context puts its mass: the advantage of each token of attempts with a known first error.

A_t = log pi(y_t | x, c, y_<t) - log pi(y_t | x, y_<t), one model on both sides, x the question and
c the context. It is what self-distillation on drawn tokens multiplies the gradient of each token
with (arXiv 2606.11173): a context that teaches where reasoning fails has its negative advantages
in the first wrong step, and none on tokens that are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fd.config import Config, Method
from mlx_fd.errors import UserError
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.statistics import Estimate, Rows
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.models.loading import Loaded
from mlx_fd.problems import Problem, prompts
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.sources import names_with_truth, truth_about
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, Materials
from mlx_fd.training.selfdistill.reading import read, token_logprobs
from mlx_fd.training.selfdistill.rollout_stats import text_after
from mlx_fd.training.selfdistill.rollouts import sample_rollouts

RIGHT, BEFORE, IN, AFTER = "right", "before", "in", "after"
PARTS = (RIGHT, BEFORE, IN, AFTER)
"""Tokens of right attempts; of wrong ones those before, in and after the first wrong step."""
MIN_ADVANTAGE = 0.01
"""A smaller advantage, in nats, is none: both sides are sure of the token."""

# Problems whose attempts are generated side by side.
_TOGETHER = 16
Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Scored:
    """An attempt with what each context makes of its tokens.

    Attributes:
        attempt: the attempt.
        pieces: the text of each token; together they are the attempt.
        parts: which of :data:`PARTS` each token is in.
        advantages: by context, in nats, one a token; not there where the context teaches nothing.
    """

    attempt: Attempt
    pieces: tuple[str, ...]
    parts: tuple[str, ...]
    advantages: Mapping[str, tuple[float, ...]]


# --------------------------------------------------------------------------------------- attempts


def attempts_of(
    loaded: Loaded, problems: Sequence[Problem], config: Config, progress: Progress
) -> list[Attempt]:
    """Let a model try each problem as often, and as warm, as a run of self-distillation would.

    Args:
        loaded: who attempts them.
        problems: with or without solutions; contexts need these later.
        config: attempts per problem, temperature, token limit and seed are a run's.
        progress: called with ``"problems"``, those done, and all.

    Returns:
        The attempts, problem by problem.
    """
    attempts: list[Attempt] = []
    for begin in range(0, len(problems), _TOGETHER):
        progress("problems", begin, len(problems))

        def seed(call: int, begin: int = begin) -> int:
            return derive_seed(config.episode.seed, begin, f"advantage/{call}")

        groups, _ = sample_rollouts(loaded, problems[begin : begin + _TOGETHER], config, seed)
        attempts += [attempt for group in groups for attempt in group]
    return attempts


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds; a character of several tokens is with its last."""
    pieces, text_so_far = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:end]))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(whole[len(text_so_far) :])
        text_so_far = whole if len(whole) > len(text_so_far) else text_so_far
    return tuple(pieces)


def parts_of(pieces: Sequence[str], span: tuple[int, int] | None) -> tuple[str, ...]:
    """The part of each token.

    Args:
        pieces: of :func:`pieces_of`.
        span: the characters of the first wrong step; ``None``: all is right. A token that has one
            of them is in it.
    """
    if span is None:
        return (RIGHT,) * len(pieces)
    parts, at = [], 0
    for piece in pieces:
        end = at + len(piece)
        parts.append(BEFORE if end <= span[0] else AFTER if at >= span[1] else IN)
        at = end
    return tuple(parts)


def check_known(problems: Sequence[Problem]) -> None:
    """Refuse problems of which no attempt's first wrong step is known.

    Raises:
        UserError: one of them is not a generated problem.
    """
    for problem in problems:
        if truth_about(problem) is None:
            raise UserError(
                f"{problem.id}: the first wrong step of an attempt is known for generated problems "
                f"only: use --problems {names_with_truth()}"
            )


# ------------------------------------------------------------------------------------- advantages


def score(
    loaded: Loaded,
    attempts: Sequence[Attempt],
    names: Sequence[str],
    materials: Materials,
    progress: Progress,
    *,
    temperature: float = 1.0,
    size: int = 32,
) -> list[Scored]:
    """The advantages of each context at each token of attempts at generated problems.

    Args:
        loaded: the model, student and self-teacher in one.
        attempts: attempts, problem by problem; those at one problem are siblings.
        names: of contexts, as in ``--context``.
        materials: what the contexts are made of.
        progress: called with ``"contexts"``, those done, and all.
        temperature: that student's and teacher's logits are divided by.
        size: texts read at once.
    """
    check_known([attempt.problem for attempt in attempts])
    options = Method(temperature=temperature)
    tokenizer = loaded.tokenizer

    def logprobs(messages: Sequence[str], of: Sequence[Attempt]) -> list[list[float]]:
        texts = [
            text_after(loaded, message, attempt.tokens, attempt.opening)
            for message, attempt in zip(messages, of, strict=True)
        ]
        if not texts:  # a context that teaches no attempt
            return []
        states = read(loaded.view, texts, size)
        found = token_logprobs(loaded.view.head, states, texts, options, loaded.vocab)
        return [values.tolist() for values, _ in found]  # type: ignore[misc]

    student = logprobs(
        [prompts.answer_prompt(a.question, form_of(a.problem)) for a in attempts], attempts
    )
    of_attempts: list[dict[str, tuple[float, ...]]] = [{} for _ in attempts]
    for done, name in enumerate(names):
        progress("contexts", done, len(names))
        views = CONTEXTS[name].views(attempts, materials)
        taught = [k for k, view in enumerate(views) if view.teacher is not None]
        teacher_rows = logprobs(
            [views[k].teacher or "" for k in taught], [attempts[k] for k in taught]
        )
        for k, teacher in zip(taught, teacher_rows, strict=True):
            of_attempts[k][name] = tuple(t - s for t, s in zip(teacher, student[k], strict=True))
    scored = []
    for attempt, advantages in zip(attempts, of_attempts, strict=True):
        pieces = pieces_of(tokenizer, attempt.tokens)
        # The end of the turn is no part of the last line.
        ended = attempt.tokens[-1] in tokenizer.eos_token_ids
        text = "".join(pieces[:-1] if ended else pieces)
        truth = truth_about(attempt.problem)
        assert truth is not None
        span = truth.span(attempt.problem, text)
        scored.append(Scored(attempt, pieces, parts_of(pieces, span), advantages))
    return scored


# ------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Summary:
    """What a context does to tokens, over problems.

    Attributes:
        context: its name.
        attempts: with a view in this context, and ``wrong`` of them wrong.
        wrong: see above.
        tokens: tokens in each part.
        mean: mean advantage in each part, in nats.
        mass_in: share of the sum of abs(A) over wrong attempts that is in the first wrong step.
        tokens_in: share of wrong attempts' tokens that are in it: what an even spread would give.
        negative: share of right tokens (of right attempts, and before the first wrong step) whose
            advantage is below -:data:`MIN_ADVANTAGE`.
    """

    context: str
    attempts: int
    wrong: int
    tokens: dict[str, int]
    mean: dict[str, Estimate]
    mass_in: Estimate
    tokens_in: Estimate
    negative: Estimate

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "context": self.context,
            "attempts": self.attempts,
            "wrong": self.wrong,
            "tokens": self.tokens,
            "mean": {part: estimate.to_json() for part, estimate in self.mean.items()},
            "mass_in": self.mass_in.to_json(),
            "tokens_in": self.tokens_in.to_json(),
            "negative": self.negative.to_json(),
        }


def _ratio(above: Rows, below: Rows) -> float:
    return float(above.sum() / below.sum()) if below.sum() else math.nan


def _of_problems(above: Rows, below: Rows) -> Estimate:
    """A ratio of sums; without an interval where all resamples have the same."""
    return Measure("ratio", list(above), _ratio, (list(below),)).estimate()


def summarise(scored: Sequence[Scored], name: str) -> Summary:
    """One context's row of the table; intervals are bootstraps over problems."""
    taught = [item for item in scored if name in item.advantages]
    problems = list(dict.fromkeys(item.attempt.problem.id for item in taught))
    # By problem and part: tokens, sum of A, sum of abs(A), tokens with a negative A.
    sums = {part: np.zeros((4, len(problems))) for part in PARTS}
    for item in taught:
        column = problems.index(item.attempt.problem.id)
        for part, value in zip(item.parts, item.advantages[name], strict=True):
            sums[part][:, column] += (1, value, abs(value), value < -MIN_ADVANTAGE)
    wrong = sums[BEFORE] + sums[IN] + sums[AFTER]
    good = sums[RIGHT] + sums[BEFORE]
    return Summary(
        context=name,
        attempts=len(taught),
        wrong=sum(RIGHT not in item.parts for item in taught),
        tokens={part: int(sums[part][0].sum()) for part in PARTS},
        mean={part: _of_problems(sums[part][1], sums[part][0]) for part in PARTS},
        mass_in=_of_problems(sums[IN][2], wrong[2]),
        tokens_in=_of_problems(sums[IN][0], wrong[0]),
        negative=_of_problems(good[3], good[0]),
    )
