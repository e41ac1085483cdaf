"""The rule by which the expert is asked, out of the run's calibration."""

from __future__ import annotations

import functools

from mlx_fd.evaluation.cascade.confidence import confidence
from mlx_fd.evaluation.cascade.file import read, why_other
from mlx_fd.serve.models import Served
from mlx_fd.serve.rule import Rule
from mlx_fd.serve.service import Options


def rule_of(options: Options, served: Served) -> Rule:
    """When the expert is asked: as the options say, else as the run was calibrated.

    Raises:
        UserError: the run's calibration is damaged.
    """
    ref, calibrated = served.judge.ref, None
    if served.scores and ref.run is not None:
        calibrated = read(ref.run)
    if calibrated is None:
        threshold = 0.0 if options.threshold is None else options.threshold
        plain = "above 0 it says that an answer is right; not calibrated"
        return Rule(threshold, None, plain if options.threshold is None else "--threshold")
    steps, promise = calibrated["confidence"], calibrated["promise"]
    expert = None if served.expert is None else served.expert.path
    why = why_other(calibrated, ref, expert)
    # What scores meant before says little of a student that has learned on.
    meaning = None if why else functools.partial(confidence, steps)
    if options.threshold is not None:
        return Rule(options.threshold, meaning, "--threshold")
    said = f"calibrated, {promise['kind']} {promise['target']:g}"
    return Rule(promise["threshold"], meaning, f"{said}, but {why}" if why else said)
