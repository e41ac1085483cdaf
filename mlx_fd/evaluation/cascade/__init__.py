"""A student that passes on what it is not sure of: what each threshold costs and brings.

A problem is *passed on* where the score of the student's answer is below a threshold; then the
expert's answer counts. The mathematics are pure: :mod:`mlx_fd.evaluation.cascade.scores`,
:mod:`mlx_fd.evaluation.cascade.curve`, :mod:`mlx_fd.evaluation.cascade.choice`,
:mod:`mlx_fd.evaluation.cascade.confidence`.
"""
