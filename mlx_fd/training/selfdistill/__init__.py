"""Self-distillation: a model learns from itself reading more than the problem.

Two things make a method: what the self-teacher sees (:mod:`mlx_fd.training.selfdistill.contexts`)
and what is matched (:mod:`mlx_fd.training.selfdistill.objectives`).
:mod:`mlx_fd.training.selfdistill.methods` has the published combinations,
:mod:`mlx_fd.training.selfdistill.training` the loop, :mod:`mlx_fd.training.selfdistill.batch` one
batch of it, :mod:`mlx_fd.training.selfdistill.learning` one update.
"""
