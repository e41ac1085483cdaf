"""What a system is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.registry import Entry
from mlx_fd.runs.records.evaluation import TrialRow
from mlx_fd.runs.records.parts import ThoughtColumns, thought_columns

if TYPE_CHECKING:
    from mlx_fd.feedback.asking import OnTokens
    from mlx_fd.feedback.gate import GateState
    from mlx_fd.feedback.pair import Pair
    from mlx_fd.feedback.stages import Answered, Usage
    from mlx_fd.models.loading import Loaded
    from mlx_fd.problems.prompts import Answer

Seeds = Callable[[str], int]
"""Step name to the seed of its draws."""
Who = Literal["expert", "student"]


@dataclass(frozen=True)
class Setting:
    """What all systems share.

    Attributes:
        pair: the models.
        generation: token limits and sampling.
        episode: the target score, and the student's weight in the combined score.
        answered_by: who wrote the answers that a system goes on from.
        state: the gate as the student's training ended; ``None`` where no run trained it.
        own_solutions: how many of its own the student's confidence comes from, too.
    """

    pair: Pair
    generation: GenerationOptions
    episode: EpisodeOptions
    answered_by: Who
    state: GateState | None
    own_solutions: int = 1


@dataclass(frozen=True)
class Trial:
    """One system's attempt at one problem.

    Attributes:
        turns: what was written, by step; the first answer is ``answer``.
        last: the step whose text is the final answer.
        score: the score that the first answer was given, ``None`` where there is none.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        seconds: this problem's share of each step's time.
        by: whose tokens they are, by step.
        capped: steps that ended at the token limit.
        thoughts: what was thought before a step's text, where something was.
        closed: steps whose thought was closed at its limit.
    """

    turns: dict[str, str]
    last: str
    score: float | None
    tokens: dict[str, int]
    prefilled: dict[str, int]
    seconds: dict[str, float]
    by: dict[str, Who]
    capped: tuple[str, ...]
    thoughts: dict[str, str] = field(default_factory=dict)
    closed: tuple[str, ...] = ()

    @property
    def final(self) -> str:
        """The final answer's text."""
        return self.turns[self.last]

    def to_json(self) -> TrialRow:
        """For a JSON file."""
        return {
            "turns": self.turns,
            "last": self.last,
            "score": self.score,
            "tokens": self.tokens,
            "prefilled": self.prefilled,
            "seconds": self.seconds,
            "by": dict(self.by),
            "capped": list(self.capped),
            **thought_columns(self.thoughts, self.closed),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trial:
        """What :meth:`to_json` gave."""
        own = {key: value[key] for key in value if key not in ThoughtColumns.__annotations__}
        own |= {
            "capped": tuple(value["capped"]),
            "thoughts": value.get("thoughts", {}),
            "closed": tuple(value.get("closed_thoughts", ())),
        }
        return cls(**own)


@dataclass(frozen=True)
class Stage:
    """One turn of a critic.

    Attributes:
        step: its name.
        request: tokens of what the expert is asked.
        begun: what those put into its mouth.
    """

    step: str
    request: tuple[int, ...]
    begun: str = ""


@dataclass(frozen=True, kw_only=True)
class System(Entry):
    """A way to an answer.

    Attributes:
        label: what a table calls it.
        begins_with: whose answers it goes on from: ``first`` are those that are judged,
            ``untrained`` those of the student as it was before.
        amateur: the student that it uses beside the expert, as trained or as it was before.
        run: does it.
        stages: for a critic, the turns in which it writes its feedback, by the expert; it then
            judges answers with known errors, too.
        is_baseline: it takes part with ``--baselines`` only.
    """

    label: str
    begins_with: Literal["first", "expert", "student", "untrained"]
    amateur: Literal["student", "untrained"] | None
    run: Callable[[Setting, Sequence[Answered], Seeds, OnTokens], list[Trial]]
    stages: Callable[[Loaded], Sequence[Stage]] | None = None
    is_baseline: bool = True


def trial(
    setting: Setting,
    answer: Answer,
    usage: Usage,
    turns: Mapping[str, str],
    last: str = "answer",
    score: float | None = None,
) -> Trial:
    """A trial with what its steps took.

    Args:
        setting: who wrote the first answer.
        answer: the first answer.
        usage: of all steps.
        turns: what was written after the first answer, by step.
        last: the step whose text is the final answer.
        score: the score of the first answer.
    """
    by: dict[str, Who] = dict.fromkeys(usage.tokens, "expert")
    by["answer"] = setting.answered_by
    by |= {step: "student" for step in ("student_feedback", "student_solution") if step in by}
    return Trial(
        turns={"answer": answer.text, **turns},
        last=last,
        score=score,
        tokens=usage.tokens,
        prefilled=usage.prefilled,
        seconds={step: round(value, 4) for step, value in usage.seconds.items()},
        by=by,
        capped=usage.capped,
        thoughts=usage.thoughts,
        closed=usage.closed,
    )
