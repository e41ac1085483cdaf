"""The sources of problems that have a name, one file each; files and the hub need none.

A source may know the truth about any answer to its problems, because it generates them. Then a
student is examined on it, ``--critic truth`` gives true critiques, and an evaluation asks who finds
the first error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlx_fd import registry
from mlx_fd.problems import Problem, ProblemSet, Verdict
from mlx_fd.registry import Entry, Registry


@dataclass(frozen=True)
class Question:
    """An answer to judge, and the truth about it.

    Attributes:
        problem: the problem.
        answer: an answer to it.
        first_error: its first wrong step from 1; 0: it is right.
        score: the score it deserves, in [-1, 1].
    """

    problem: Problem
    answer: str
    first_error: int
    score: float


def _line_span(verdict: Verdict, answer: str) -> tuple[int, int] | None:
    """The line of the first wrong step, where each step is a line."""
    if not verdict.first_error:
        return None
    lines = answer.split("\n")
    at = min(verdict.first_error, len(lines)) - 1
    begin = sum(len(line) + 1 for line in lines[:at])
    return begin, begin + max(len(lines[at]), 1)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a source knows of any answer to its problems.

    Attributes:
        knows: whether a problem is one of the source's; no other source's may be.
        judge: the first wrong step of an answer, as ProcessBench (arXiv 2412.06559) defines it.
        feedback: the right feedback on an answer, in words that
            :func:`mlx_fd.problems.arithmetic.first_error` reads back.
        rewrite: an answer with its right steps verbatim and the others mended.
        questions: size, seed and split to an examination: every second answer wrong.
        error_span: where the first wrong step stands in an answer: its first character, and one
            past its last; ``None``: all is right. By default each step is a line.
        prose: a problem's solution as another author would write it; by default as it is.
        lessons: for a kind of error, what to do otherwise; one sentence.
    """

    knows: Callable[[Problem], bool]
    judge: Callable[[Problem, str], Verdict]
    feedback: Callable[[Problem, str], str]
    rewrite: Callable[[Problem, str], str]
    questions: Callable[[int, int, str], tuple[Question, ...]]
    error_span: Callable[[Problem, str], tuple[int, int] | None] | None = None
    prose: Callable[[Problem], str] | None = None
    lessons: Mapping[str, str] = field(default_factory=dict)

    def span(self, problem: Problem, answer: str) -> tuple[int, int] | None:
        """Where the first wrong step stands in an answer, as ``error_span`` or by lines."""
        if self.error_span is not None:
            return self.error_span(problem, answer)
        return _line_span(self.judge(problem, answer), answer)


def _as_typed(step: str) -> str:
    return step


@dataclass(frozen=True, kw_only=True)
class ProblemSource(Entry):
    """A source of problems with a name.

    Attributes:
        load: a split's problems; raises :class:`mlx_fd.errors.UserError` where there is no such
            split. There must be ``train`` and ``test``.
        truth: what it knows of answers; ``None``: nothing but each problem's final number.
        transfer_split: a split unlike the others, which every full evaluation has beside its own
            problems; empty: none.
        write_step: a step of a solution as the source's solutions have it, where somebody typed it
            in another way; by default as it was typed.
    """

    load: Callable[[str], ProblemSet]
    truth: Truth | None = None
    transfer_split: str = ""
    write_step: Callable[[str], str] = _as_typed


SOURCES: Registry[ProblemSource] = registry.SOURCES
register_source = SOURCES.register


def truth_about(problem: Problem) -> Truth | None:
    """The truth about answers to a problem; ``None``: no source knows it."""
    known = (source.truth for source in SOURCES.values() if source.truth is not None)
    return next((truth for truth in known if truth.knows(problem)), None)


def truth_of(source: str) -> Truth | None:
    """What a source knows, by its name; ``None`` for one that knows nothing, a file or the hub."""
    return SOURCES[source].truth if source in SOURCES else None


def step_writer(source: str) -> Callable[[str], str]:
    """How steps are written in the solutions of a source, by its name; files, the hub: as typed."""
    return SOURCES[source].write_step if source in SOURCES else _as_typed


def names_with_truth() -> str:
    """The sources that know the truth, for a message: ``arithmetic``."""
    return " or ".join(name for name, source in SOURCES.items() if source.truth is not None)
