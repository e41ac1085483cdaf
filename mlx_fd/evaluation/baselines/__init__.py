"""What the loop is compared with: other ways to an answer, with the same models and accounting.

One file for each system, or for a few that are alike. Each takes a batch of answered problems and
goes on from there. The bare models stop at their own answers; all others begin with the same first
answers, so that their results are paired. An answer whose score reaches ``target_score`` stays as
it is, in each of them.
"""

from __future__ import annotations

from mlx_fd import registry
from mlx_fd.evaluation.baselines.trials import Setting, System, Trial
from mlx_fd.registry import Registry

__all__ = [
    "BASE",
    "CLEAR",
    "LOOP",
    "STUDENT",
    "SYSTEMS",
    "Setting",
    "System",
    "Trial",
    "register_system",
]

LOOP, STUDENT, CLEAR, BASE = "loop", "student", "clear", "base"

SYSTEMS: Registry[System] = registry.SYSTEMS
register_system = SYSTEMS.register
