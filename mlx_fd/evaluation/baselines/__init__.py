"""What the loop is compared with: other ways to an answer, with the same models and accounting.

Each system takes a batch of answered problems and goes on from there (:data:`SYSTEMS`). The bare
models stop at their own answers; all others begin with the same first answers, so that their
results are paired. An answer whose score reaches ``target_score`` stays as it is, in each of them.
"""

from __future__ import annotations

from mlx_fd.evaluation.baselines.bare import as_answered
from mlx_fd.evaluation.baselines.clear import clear, loop
from mlx_fd.evaluation.baselines.critics import cod, cot
from mlx_fd.evaluation.baselines.self_refine import self_refine
from mlx_fd.evaluation.baselines.trials import Setting, System, Trial

__all__ = ["BASE", "CLEAR", "LOOP", "STUDENT", "SYSTEMS", "Setting", "System", "Trial"]

LOOP, STUDENT, CLEAR, BASE = "loop", "student", "clear", "base"

SYSTEMS = {
    LOOP: System("Online feedback distillation", "first", "student", loop),
    CLEAR: System("CLEAR, fixed amateur", "first", "untrained", clear),
    "cot": System("Chain-of-thought critic", "first", None, cot),
    "cod": System("Chain-of-drafts critic", "first", None, cod),
    "self-refine": System("Self-Refine", "first", None, self_refine),
    "expert": System("Expert alone", "expert", None, as_answered),
    STUDENT: System("Student alone", "student", None, as_answered),
    BASE: System("Base model alone", "untrained", None, as_answered),
}
