"""Expert and amateur: a fixed one (CLEAR, arXiv 2504.07116), and the distilled one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.evaluation.baselines import CLEAR, LOOP, register_system
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, System, Trial, trial

if TYPE_CHECKING:
    from mlx_fd.feedback.episode import Draft, Outcome, Progress


def clear(
    setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    """Both give feedback; it is merged, the expert revises, criticises itself and answers.

    The amateur never learns. It has no score head, so the score that it wrote stands for its own.
    """
    from mlx_fd.feedback.episode import expert_feedback, student_feedback

    options = setting.generation
    judged = [
        dataclasses.replace(draft, student_score=draft.student_feedback.score)
        for draft in student_feedback(
            setting.pair, drafts, options, seeds("student_feedback"), progress
        )
    ]
    judged = expert_feedback(setting.pair, judged, options, seeds("expert_feedback"), progress)
    return _finished(setting, judged, seeds, progress)


def loop(
    setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    """The same with the distilled student, as the run would be deployed.

    Where its training ended frozen and the gate trusts it, its feedback stands alone where it is
    sure; the expert is asked for the rest. Nothing is audited, because nothing learns.
    """
    from mlx_fd.feedback.episode import expert_feedback, student_feedback
    from mlx_fd.feedback.gate import stands_alone

    options = setting.generation
    judged = student_feedback(setting.pair, drafts, options, seeds("student_feedback"), progress)
    asked = [
        place
        for place, draft in enumerate(judged)
        if setting.state is None
        or not stands_alone(setting.state, draft.student_score, setting.gate)
    ]
    answered = expert_feedback(
        setting.pair,
        [judged[place] for place in asked],
        options,
        seeds("expert_feedback"),
        progress,
    )
    for place, draft in zip(asked, answered, strict=True):
        judged[place] = draft
    return _finished(setting, judged, seeds, progress)


def _finished(
    setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    from mlx_fd.feedback.episode import finish

    outcomes = finish(setting.pair, drafts, setting.generation, setting.episode, seeds, progress)
    return [_trial(setting, outcome) for outcome in outcomes]


def _trial(setting: Setting, outcome: Outcome) -> Trial:
    draft = outcome.draft
    written = {
        "student_feedback": draft.student_feedback.text,
        "expert_feedback": draft.expert_feedback.text if draft.expert_feedback else "",
        "merge": outcome.merged,
        "revise": outcome.revised,
        "critique": outcome.critique,
        "final": outcome.final.text,
    }
    turns = {step: text for step, text in written.items() if step in draft.tokens}
    return trial(setting, draft, turns, "final" if "final" in turns else "answer", outcome.score)


register_system(
    System(
        name=LOOP,
        help="expert and trained student, as the run would be deployed",
        order=10,
        label="Online feedback distillation",
        begins_with="first",
        amateur="student",
        run=loop,
        is_baseline=False,
    )
)
register_system(
    System(
        name=CLEAR,
        help="expert and untrained student give feedback together (CLEAR, arXiv 2504.07116)",
        order=20,
        label="CLEAR, fixed amateur",
        begins_with="first",
        amateur="untrained",
        run=clear,
    )
)
