"""No right answers: prompts and chats, whose replies can be judged but not compared."""

from __future__ import annotations

from mlx_fd.problems.kinds import AnswerKind, register_kind
from mlx_fd.problems.prompts import Form

register_kind(
    AnswerKind(
        name="none",
        help="no right answer is known, and replies are judged by the models alone",
        order=60,
        # The question says by itself what is wanted.
        form=Form(end="", steps=False),
        read=lambda text, problem, how: None,
        same=lambda final, problem: False,
        gold=lambda answer, choices: "",
        graded=False,
        exclusive=False,
    )
)
