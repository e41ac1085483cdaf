"""One episode of Online Feedback Distillation: its five steps, as one function for each half.

1. The expert, or the student, answers.            :func:`~.turns.write_first_answer`
2. Student and expert each give feedback.          :func:`first_half`
3. The gate decides who learns.                    :mod:`.gate`
4. The student learns,                             :mod:`.distill`
   and gives its feedback again.                   :func:`second_half`
5. The expert merges both feedbacks, revises, criticises its revision and gives the final answer.
                                                   :func:`~.turns.write_final`

The gate and the update need the feedback on all of a batch's answers; all else is one problem's.
"""

from __future__ import annotations

from collections.abc import Callable

from mlx_fd.config import Config
from mlx_fd.feedback import gate
from mlx_fd.feedback.asking import Turns
from mlx_fd.feedback.own_solutions import write_solutions
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import Answered, Finished, Judged, StudentFeedback
from mlx_fd.feedback.turns import (
    judged_by,
    said_again,
    write_expert_feedback,
    write_final,
    write_student_feedback,
)
from mlx_fd.feedback.verdicts import Reviewed, write_review


def first_half(
    pair: Pair,
    answering: Turns[Answered],
    config: Config,
    needs_expert: Callable[[Answered, StudentFeedback], bool],
) -> Turns[Reviewed]:
    """Steps 1 and 2 of an episode.

    Args:
        pair: the models.
        answering: step 1.
        config: of the run.
        needs_expert: whether the expert gives feedback, too, after the student's.
    """
    options = config.generation
    answered = yield from answering
    student = yield from write_student_feedback(pair, answered, options)
    if gate.may_trust(config.gate):
        own = config.gate.own_solutions
        student = yield from write_solutions(pair, answered, student, options, own)
    expert = None
    if needs_expert(answered, student):
        expert = yield from write_expert_feedback(pair, answered, options)
    judged = judged_by(answered, student, expert)
    del answered  # Nothing but the result keeps the answer's cache.
    return (yield from write_review(pair, judged, config.losses.expert_verdicts, options))


def second_half(pair: Pair, judged: Judged, config: Config, *, again: bool) -> Turns[Finished]:
    """Steps 4, its end, and 5 of an episode.

    Args:
        pair: the models.
        judged: the episode after step 2.
        config: of the run.
        again: whether the student gives its feedback again, after it learned.
    """
    if again:
        step = "student_feedback_again"
        student = yield from write_student_feedback(pair, judged.answered, config.generation, step)
        judged = said_again(judged, student)
    return (yield from write_final(pair, judged, config.generation, config.episode))
