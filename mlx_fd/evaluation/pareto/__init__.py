"""Where to stop distilling: what each stopping threshold costs and brings, and which is the best.

In the order of the work: :mod:`mlx_fd.evaluation.pareto.curve` reads how a run learned,
:mod:`mlx_fd.evaluation.pareto.thresholds` asks the gate where it would have stopped,
:mod:`mlx_fd.evaluation.pareto.points` what that costs and brings,
:mod:`mlx_fd.evaluation.pareto.exam` what the student could do there;
:mod:`mlx_fd.evaluation.pareto.choice` weighs these by the mathematics of
:mod:`mlx_fd.evaluation.pareto.frontier` and writes what was found;
:mod:`mlx_fd.evaluation.pareto.sweep` trains each threshold for real. Only examinations need MLX.
"""
