"""mlx-fd: Online Feedback Distillation on Apple Silicon with MLX.

What is meant for use in Python is here (docs/python.md); it is imported when it is first asked for,
so that ``import mlx_fd`` and the command line's ``--help`` are quick.
"""

import importlib
from typing import TYPE_CHECKING

from mlx_fd._version import __version__
from mlx_fd.models.backend import load_blas

if TYPE_CHECKING:
    from mlx_fd.errors import UserError
    from mlx_fd.feedback.judge import Judge, Judgement, give_feedback, open_student
    from mlx_fd.feedback.pair import Pair, load_pair
    from mlx_fd.losses.divergence import Target, fused_linear_divergence, fused_linear_divergences
    from mlx_fd.losses.teacher import TopK, teacher_top_k
    from mlx_fd.runs.events import BatchDone, Event, Note, Probed, Probing, Started, Step, Warned
    from mlx_fd.training.session import RunResult, resume_run, run_loop

# Before anything imports MLX, whose BLAS symbols bind once.
load_blas()

__all__ = [
    "BatchDone",
    "Event",
    "Judge",
    "Judgement",
    "Note",
    "Pair",
    "Probed",
    "Probing",
    "RunResult",
    "Started",
    "Step",
    "Target",
    "TopK",
    "UserError",
    "Warned",
    "__version__",
    "fused_linear_divergence",
    "fused_linear_divergences",
    "give_feedback",
    "load_pair",
    "open_student",
    "resume_run",
    "run_loop",
    "teacher_top_k",
]

_MODULES = {
    "mlx_fd.errors": ("UserError",),
    "mlx_fd.feedback.judge": ("Judge", "Judgement", "give_feedback", "open_student"),
    "mlx_fd.feedback.pair": ("Pair", "load_pair"),
    "mlx_fd.losses.divergence": (
        "Target",
        "fused_linear_divergence",
        "fused_linear_divergences",
    ),
    "mlx_fd.losses.teacher": ("TopK", "teacher_top_k"),
    "mlx_fd.runs.events": (
        "BatchDone",
        "Event",
        "Note",
        "Probed",
        "Probing",
        "Started",
        "Step",
        "Warned",
    ),
    "mlx_fd.training.session": ("RunResult", "resume_run", "run_loop"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # it would hide a name that is misspelt

    def __getattr__(name):
        """Import a public name when it is first asked for (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from mlx_fd.models.backend import backend

        # Sets MLX up, or says which extra brings a backend.
        backend()
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
