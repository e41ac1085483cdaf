"""Problems without right answers: which methods can learn from them."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import are_graded
from mlx_fd.training.selfdistill.contexts import CONTEXTS

_REWARDED = ("grpo", "contrastive", "echo")


def check_gold(config: Config, problems: Sequence[Problem]) -> None:
    """Make sure that a method has what it needs of its problems.

    Args:
        config: of a run of self-distillation.
        problems: all that the run uses.

    Raises:
        UserError: it is made of right and wrong answers, and the problems have none; or it shows
            solutions, and some have none.
    """
    context, source = CONTEXTS[config.selfdistill.context], config.problems.problems
    if context.needs_solution and (bare := sum(not one.solution.strip() for one in problems)):
        raise UserError(
            f"--context {context.name} shows a reference solution, and {bare} of the "
            f"{len(problems)} problems drawn from {source} have none"
        )
    if are_graded(problems):
        return
    if reason := _needs_gold(config):
        raise UserError(
            f"{source} has no right answers (kind none), and {reason}: choose another method, or "
            "problems with answers"
        )


def _needs_gold(config: Config) -> str:
    """What in a configuration asks for right answers, in words; empty: nothing."""
    options = config.selfdistill
    if options.objective in _REWARDED:
        return f"--objective {options.objective} rewards right answers"
    if options.policy_weight:
        return "--policy-weight adds a loss that rewards right answers"
    context = CONTEXTS[options.context]
    if context.needs_gold or (options.context == "feedback" and not options.critic):
        return f"--context {context.name} says which attempts are right" + (
            "" if context.needs_gold else " where there is no --critic"
        )
    if (
        options.self_teacher == "expert"
        and options.expert_answers == "right"
        and config.losses.on_policy_fraction < 1
    ):
        return (
            "of the expert's answers only right ones are learned from (--expert-answers all takes "
            "all)"
        )
    if config.gate.gate == "ema":
        return "--gate ema stops by how many held-out problems are answered right"
    return ""
