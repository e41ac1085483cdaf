"""An episode after each of its stages.

After step 1 an episode is :class:`Answered`, after step 2 :class:`Judged`, after step 5
:class:`Finished`; each holds the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_fd.models.conversation import Conversation
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right
from mlx_fd.problems.prompts import Answer, Feedback

# What a verdict loses in log-probability where the student's own solutions contradict it (so much
# that these verdicts are the last to be trusted; more changes nothing), and for each unit that the
# score head's score is away from it.
CONTRADICTED, DOUBTED = 6.0, 2.0


@dataclass(frozen=True)
class Usage:
    """What steps of an episode took, each by the step's name.

    Attributes:
        tokens: tokens written.
        prefilled: tokens read.
        seconds: this problem's share of the batch's time.
        capped: steps that ended at the token limit.
        thoughts: what was thought before a step's text, where something was.
        closed: steps whose thought was closed at its limit.
        accepted: where the writer had a draft, the tokens of a step that this had proposed.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    prefilled: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    capped: tuple[str, ...] = ()
    thoughts: dict[str, str] = field(default_factory=dict)
    closed: tuple[str, ...] = ()
    accepted: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        """The steps of both, this one's first; a step is in one of them only."""
        return Usage(
            {**self.tokens, **other.tokens},
            {**self.prefilled, **other.prefilled},
            {**self.seconds, **other.seconds},
            (*self.capped, *other.capped),
            {**self.thoughts, **other.thoughts},
            (*self.closed, *other.closed),
            {**self.accepted, **other.accepted},
        )


@dataclass(frozen=True)
class Answered:
    """An episode after step 1.

    Attributes:
        problem: the problem.
        answer: the first answer, the expert's unless ``answers_by`` says otherwise.
        conversation: the expert's conversation up to and with that answer.
        request: tokens of the request for feedback, as they follow the answer.
        usage: of the answer.
        by_student: whether the student gave the answer, which stands in the conversation as if the
            expert had.
    """

    problem: Problem
    answer: Answer
    conversation: Conversation
    request: tuple[int, ...]
    usage: Usage = field(default_factory=Usage)
    by_student: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """All tokens that the expert reads before its feedback, but for what it thinks."""
        return (*self.conversation.tokens, *self.request)

    @property
    def is_correct(self) -> bool | None:
        """Whether the first answer is right; ``None`` where nobody knows."""
        return is_right(self.answer.final, self.problem)


def verdict_score(written: float | None, head: float | None) -> float | None:
    """The score whose sign is a student's verdict: that of its text, the head's without one."""
    return head if written is None else written


@dataclass(frozen=True)
class StudentFeedback:
    """What the student says of an answer.

    Attributes:
        feedback: its text, the score written in it, and its tokens.
        head_score: its score head's score in (-1, 1), read where ``score_at`` says; ``None``: it
            has no head that a loss teaches.
        usage: of the feedback.
        logprob: log-probability of the feedback's tokens, all together, when they were drawn.
        solves_alike: the share of its own solutions of the problem that come to the answer's
            final; ``None``: not known.
    """

    feedback: Feedback
    head_score: float | None
    usage: Usage = field(default_factory=Usage)
    logprob: float = 0.0
    solves_alike: float | None = None

    @property
    def score(self) -> float | None:
        """The score that counts in the combined one: the head's, else the written one."""
        return self.feedback.written_score if self.head_score is None else self.head_score

    @property
    def verdict(self) -> float | None:
        """The score whose sign is its verdict: that of its text, which is what stands alone.

        The head's where none can be read.
        """
        return verdict_score(self.feedback.written_score, self.head_score)

    @property
    def confidence(self) -> float | None:
        """How sure it is of its verdict, in [0, 1]; ``None`` without one.

        1 / (1 + -log p) of the text that it wrote, which counts as less likely, by
        :data:`CONTRADICTED` nats where all of its own solutions say otherwise, and by up to twice
        :data:`DOUBTED` the less its head agrees. Together they tell best where it says what the
        expert says (docs/log.md).
        """
        if self.verdict is None:
            return None
        doubt, right = -self.logprob, self.verdict > 0
        if self.solves_alike is not None:
            doubt += CONTRADICTED * (1 - self.solves_alike if right else self.solves_alike)
        if self.head_score is not None:
            doubt += DOUBTED * (1 - self.head_score if right else 1 + self.head_score)
        return round(1 / (1 + doubt), 6)


@dataclass(frozen=True)
class ExpertFeedback:
    """What the expert says of an answer.

    Attributes:
        feedback: its text, the score written in it, and its tokens.
        conversation: the expert's conversation up to and with it.
        usage: of the feedback.
        prompt: all tokens before it where they are not those of the episode: it was asked with the
            right answer in sight (:mod:`mlx_fd.feedback.verdicts`).
    """

    feedback: Feedback
    conversation: Conversation
    usage: Usage = field(default_factory=Usage)
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Judged:
    """An episode after step 2.

    Attributes:
        answered: the episode after step 1.
        student: the student's feedback.
        expert: the expert's; ``None`` where the student stands alone.
        before: the student's first feedback, where it gave another one after it learned.
    """

    answered: Answered
    student: StudentFeedback
    expert: ExpertFeedback | None
    before: StudentFeedback | None = None

    @property
    def problem(self) -> Problem:
        """The episode's problem."""
        return self.answered.problem

    @property
    def conversation(self) -> Conversation:
        """The expert's conversation so far."""
        return self.expert.conversation if self.expert else self.answered.conversation

    @property
    def usage(self) -> Usage:
        """Of steps 1 and 2."""
        found = self.answered.usage + self.student.usage
        found = found + self.before.usage if self.before else found
        return found + self.expert.usage if self.expert else found


@dataclass(frozen=True)
class Finished:
    """The end of an episode, after step 5.

    Attributes:
        judged: the episode after step 2.
        score: the combined score; ``None`` where the expert's could not be read, or neither model
            gave one.
        merged: the feedback that the revision follows; empty where none was needed.
        revised: the revised answer's text; empty where the first answer was good enough.
        critique: the expert's critique of its revision; empty likewise.
        final: the final answer.
        usage: of all steps.
        solution: the expert's own, by which it checked what the student alone found right; ``None``
            where it wrote none.
    """

    judged: Judged
    score: float | None
    merged: str
    revised: str
    critique: str
    final: Answer
    usage: Usage
    solution: Answer | None = None

    @property
    def problem(self) -> Problem:
        """The episode's problem."""
        return self.judged.problem

    @property
    def is_correct(self) -> bool | None:
        """Whether the final answer is right; ``None`` where nobody knows."""
        return is_right(self.final.final, self.problem)


def combined_score(expert: float | None, student: float | None, weight: float) -> float | None:
    """(weight * student + expert) / (1 + weight); the one that is there where the other is not."""
    if expert is None or student is None:
        return student if expert is None else expert
    return (weight * student + expert) / (1 + weight)
