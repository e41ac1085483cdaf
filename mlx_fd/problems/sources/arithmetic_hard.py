"""The generated word problems with more steps, for the pair whose expert is often wrong on them."""

from __future__ import annotations

import dataclasses
import functools

from mlx_fd.problems import arithmetic
from mlx_fd.problems.sources import ProblemSource, register_source
from mlx_fd.problems.sources.arithmetic import TRUTH, is_hard, questions

register_source(
    ProblemSource(
        name=arithmetic.HARD,
        help="those of three and four steps, many of which tiny-hard gets wrong at first",
        order=30,
        load=functools.partial(arithmetic.load, hard=True),
        write_step=arithmetic.write_step,
        truth=dataclasses.replace(
            TRUTH,
            knows=lambda problem: arithmetic.is_generated(problem.solution) and is_hard(problem),
            questions=functools.partial(questions, hard=True),
        ),
    )
)
