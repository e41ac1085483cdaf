"""The two doors through which a model's text enters the program.

What an assistant wrote is read by :func:`final_answer` and :func:`parse_feedback`. Neither ever
guesses: what cannot be read is ``None``, and the caller counts it. Both read any text in time
linear in its length: patterns hold on to what they took (possessive repeats) wherever they could
not take it otherwise.
"""

from mlx_fd.problems.parsing.answers import (
    after_mark,
    boxed,
    final_answer,
    final_part,
    final_text,
    gold_part,
    is_number,
    lm_eval_answer,
    lm_eval_match,
    lm_eval_readable,
    marked,
    number,
    without_lead,
)
from mlx_fd.problems.parsing.feedbacks import needs_merge, parse_feedback

__all__ = [
    "after_mark",
    "boxed",
    "final_answer",
    "final_part",
    "final_text",
    "gold_part",
    "is_number",
    "lm_eval_answer",
    "lm_eval_match",
    "lm_eval_readable",
    "marked",
    "needs_merge",
    "number",
    "parse_feedback",
    "without_lead",
]
