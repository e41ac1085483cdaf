"""Expert and amateur: a fixed one (CLEAR, arXiv 2504.07116), and the distilled one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_fd.evaluation.baselines import CLEAR, LOOP, register_system
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, System, Trial, trial

if TYPE_CHECKING:
    from mlx_fd.feedback.asking import OnTokens
    from mlx_fd.feedback.stages import Answered, Finished, Judged


def clear(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """Both give feedback; it is merged, the expert revises, criticises itself and answers.

    The amateur never learns. It has no score head, so the score that it wrote stands for its own.
    """
    from mlx_fd.feedback.turns import expert_feedback, judge, student_feedback

    pair, options = setting.pair, setting.generation
    students = [
        dataclasses.replace(student, head_score=None)
        for student in student_feedback(
            pair, answered, options, seeds("student_feedback"), on_tokens
        )
    ]
    experts = expert_feedback(pair, answered, options, seeds("expert_feedback"), on_tokens)
    judged = judge(answered, students, dict(enumerate(experts)))
    return _finished(setting, judged, seeds, on_tokens)


def loop(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """The same with the distilled student, as the run would be deployed.

    Where the gate trusts it, its feedback stands alone; the expert is asked for the rest. Nothing
    is audited, because nothing learns.
    """
    from mlx_fd.feedback.gate import stands_alone
    from mlx_fd.feedback.own_solutions import solve_alike
    from mlx_fd.feedback.turns import expert_feedback, judge, student_feedback

    pair, options, state = setting.pair, setting.generation, setting.state
    students = student_feedback(pair, answered, options, seeds("student_feedback"), on_tokens)
    if state is not None and state.running.trust.threshold is not None:
        number, seed = setting.own_solutions, seeds("student_solution")
        students = solve_alike(pair, answered, students, options, number, seed, on_tokens)
    asked = [
        index
        for index, student in enumerate(students)
        if state is None or not stands_alone(state, student.confidence)
    ]
    experts = expert_feedback(
        pair, [answered[index] for index in asked], options, seeds("expert_feedback"), on_tokens
    )
    judged = judge(answered, students, dict(zip(asked, experts, strict=True)))
    return _finished(setting, judged, seeds, on_tokens)


def _finished(
    setting: Setting, judged: Sequence[Judged], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    from mlx_fd.feedback.turns import merge_and_revise

    finished = merge_and_revise(
        setting.pair, judged, setting.generation, setting.episode, seeds, on_tokens
    )
    return [_trial(setting, one) for one in finished]


def _trial(setting: Setting, finished: Finished) -> Trial:
    judged = finished.judged
    written = {
        "student_feedback": judged.student.feedback.text,
        "expert_feedback": judged.expert.feedback.text if judged.expert else "",
        "expert_solution": finished.solution.text if finished.solution else "",
        "merge": finished.merged,
        "revise": finished.revised,
        "critique": finished.critique,
        "final": finished.final.text,
    }
    usage = finished.usage
    turns = {step: text for step, text in written.items() if step in usage.tokens}
    last = "final" if "final" in turns else "answer"
    return trial(setting, judged.answered.answer, usage, turns, last, finished.score)


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
