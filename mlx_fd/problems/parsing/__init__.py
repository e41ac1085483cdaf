"""The two doors through which a model's text enters the program.

What an assistant wrote is read by :func:`final_answer` and :func:`parse_feedback`. Neither ever
guesses: what cannot be read is ``None``, and the caller counts it. Both read any text in time
linear in its length: patterns hold on to what they took (possessive repeats) wherever they could
not take it otherwise.
"""

from mlx_fd.problems.parsing.answers import final_answer, final_part, gold_part
from mlx_fd.problems.parsing.feedbacks import needs_merge, parse_feedback
from mlx_fd.problems.parsing.lm_eval import lm_eval_answer, lm_eval_match, lm_eval_readable
from mlx_fd.problems.parsing.marks import after_mark, boxed, final_text, marked, without_lead
from mlx_fd.problems.parsing.numbers import is_number, number

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
