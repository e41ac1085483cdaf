"""What reflections leave behind: lessons from failures, and the solutions that came out right.

After Resd (arXiv 2605.12741), in miniature: there a model tags each lesson as helpful or harmful;
here a lesson stays by how often and how lately it was drawn from a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_LESSONS = 12


@dataclass(frozen=True)
class Lesson:
    """Something to do otherwise next time.

    Attributes:
        text: one sentence.
        failures: how many failures it was drawn from.
        last: the round in which it was drawn last.
    """

    text: str
    failures: int
    last: int


@dataclass(frozen=True)
class Playbook:
    """Lessons and solutions after some rounds; a value, so that a checkpoint can hold it.

    Attributes:
        lessons: at most :data:`MAX_LESSONS`, in the order in which they were first drawn.
        solutions: by problem id, the last right solution of it.
        rounds: how many rounds of attempts went in.
    """

    lessons: tuple[Lesson, ...] = ()
    solutions: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 0

    def after(self, lessons: list[str], solutions: Mapping[str, str]) -> Playbook:
        """The playbook after one more round.

        Args:
            lessons: one for each failure that taught something; the same one may come often.
            solutions: by problem id, right solutions of this round.
        """
        by_text = {lesson.text: lesson for lesson in self.lessons}
        for text in lessons:
            failures = by_text[text].failures if text in by_text else 0
            by_text[text] = Lesson(text, failures + 1, self.rounds)
        kept = sorted(by_text.values(), key=lambda lesson: (-lesson.last, -lesson.failures))
        names = {lesson.text for lesson in kept[:MAX_LESSONS]}
        return Playbook(
            tuple(lesson for text, lesson in by_text.items() if text in names),
            {**self.solutions, **solutions},
            self.rounds + 1,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, for a checkpoint's JSON."""
        return {
            "lessons": [vars(lesson) for lesson in self.lessons],
            "solutions": dict(self.solutions),
            "rounds": self.rounds,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Playbook:
        """What :meth:`to_json` wrote."""
        lessons = tuple(Lesson(**lesson) for lesson in state["lessons"])
        return cls(lessons, dict(state["solutions"]), state["rounds"])
