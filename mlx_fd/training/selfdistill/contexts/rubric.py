"""Criteria of a good answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_fd.problems import Problem
from mlx_fd.training.selfdistill.contexts import (
    Attempt,
    Context,
    Materials,
    View,
    message,
    quoted,
    register_context,
    student_prompt,
)


def rubric_message(problem: Problem, rubric: str) -> str:
    """The question with the criteria of a good answer."""
    return message(problem, f"A good answer meets these criteria:\n{quoted(rubric)}")


_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_VERBS = {"+": "adds", "-": "subtracts", "*": "multiplies", "x": "multiplies", "/": "divides"}
_MARK = re.compile(r"<<([^<>=]*)=[^<>]*>>")
_OPERATION = re.compile(r"(?<=[\d.%)])\s*([-+*x/])")
_GENERAL = (
    "Every number of the question that bears on what is asked is used, and no other.",
    "Every calculation is written out and right.",
    "The last line gives the final number.",
)
# Of answers that are no numbers.
_OF_ANY_KIND = (
    "All that the question asks is answered, and nothing else.",
    "Every statement is right.",
    "It ends in the form that is asked for.",
)


def rubric(problem: Problem) -> str:
    """Criteria of a good answer to a problem, without a digit of the answer or of any other number.

    Where the solution marks its calculations, as GSM8K's do, the rubric says what kind each is.
    """
    marks = [_OPERATION.findall(mark) for mark in _MARK.findall(problem.solution)]
    kinds = [" and ".join(dict.fromkeys(_VERBS[sign] for sign in mark)) for mark in marks if mark]
    lines = [
        f"The {order} step {verb}."
        for order, verb in zip(_ORDER, kinds, strict=False)
        if len(kinds) <= len(_ORDER)
    ]
    general = _GENERAL if problem.kind == "number" else _OF_ANY_KIND
    return "\n".join(f"- {line}" for line in [*lines, *general])


def views(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Criteria of a good answer, without the answer (RCSD, 2606.19327).

    A critic writes them, once for each problem; an empty text teaches nothing. Without a critic,
    and where the truth is asked for, they are :func:`rubric`'s.
    """
    from mlx_fd.training.selfdistill.critics import rubrics

    problems = {a.problem.id: a.problem for a in attempts}
    if materials.truth or materials.critic is None:
        texts = [rubric(problem) for problem in problems.values()]
    else:
        texts = rubrics(list(problems.values()), materials)
    written = dict(zip(problems, texts, strict=True))
    return [
        View(
            student_prompt(a),
            rubric_message(a.problem, text) if text else None,
            note=text,
        )
        for a, text in ((a, written[a.problem.id]) for a in attempts)
    ]


register_context(
    Context(
        name="rubric",
        help="criteria of a good answer, without the answer (RCSD, 2606.19327)",
        order=50,
        views=views,
        options=frozenset({"critic", "critic_sees", "reference_style"}),
        needs_gold=True,
    )
)
