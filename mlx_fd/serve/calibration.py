"""The rule by which the expert is asked, out of the run's calibration."""

from __future__ import annotations

import functools
import shlex

from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.confidence import confidence
from mlx_fd.evaluation.cascade.file import read, why_other
from mlx_fd.evaluation.cascade.scores import ANSWER, HEAD, SCORES
from mlx_fd.feedback.judge import ModelRef
from mlx_fd.runs.records.cascade import CascadeFile
from mlx_fd.serve.models import Served
from mlx_fd.serve.rule import Rule
from mlx_fd.serve.service import Options


def calibration_of(options: Options, ref: ModelRef) -> CascadeFile | None:
    """The calibration of a student's run; ``None`` where there is none.

    Raises:
        UserError: it is damaged, or of another score than the server is to use; or a threshold is
            named that may be of either score, or score or threshold where nothing has them.
    """
    found = None if ref.run is None else read(ref.run)
    wanted = options.score
    if wanted == HEAD.name and not ref.scores:
        raise UserError("--score head: this student has no trained score head; take --score answer")
    if options.expert is None and not ref.scores and (wanted or options.threshold is not None):
        option = f"--score {wanted}" if wanted else f"--threshold {options.threshold:g}"
        raise UserError(
            f"{option}: the student has no trained score head, and there is no expert to pass "
            f"requests on to; add --expert NAME, or leave {option.partition(' ')[0]} out"
        )
    if found is None and wanted is None and options.threshold is not None and ref.scores:
        raise UserError(
            f"--threshold {options.threshold:g}: it is not said of which score; say --score "
            f"{ANSWER.name} or --score {HEAD.name}, which this student has both"
        )
    if found is None or wanted is None or options.threshold is not None:
        return found
    if found["score"] != wanted:
        raise UserError(
            f"--score {wanted}: {ref.run} was calibrated with --score {found['score']}, and a "
            "threshold of one score means nothing for another; leave --score out, calibrate "
            f"again (mlx-fd cascade calibrate {shlex.quote(str(ref.run))} --score {wanted}, with a "
            "promise), or name a --threshold"
        )
    return found


def rule_of(options: Options, served: Served) -> Rule:
    """When the expert is asked: as the options say, else as the run was calibrated.

    Raises:
        UserError: as :func:`calibration_of`.
    """
    ref = served.judge.ref
    calibrated = calibration_of(options, ref)
    if calibrated is None:
        score = SCORES[options.score or ANSWER.name]
        if options.threshold is not None:
            return Rule(score, options.threshold, None, "--threshold")
        # What a score means is not known until it is measured.
        return Rule(score, None, None, "it is not calibrated, and no --threshold is given")
    steps, promise = calibrated["confidence"], calibrated["promise"]
    score = SCORES[options.score or calibrated["score"]]
    expert = None if served.expert is None else served.expert.path
    why = why_other(calibrated, ref, expert) or _why_otherwise(options, ref)
    # What scores meant before says little of a student that has learned on.
    holds = not why and score.name == calibrated["score"]
    meaning = functools.partial(confidence, steps) if holds else None
    assert ref.config is not None  # it was calibrated: it is a run's
    tokens = ref.config.generation.max_answer_tokens
    if options.threshold is not None:
        return Rule(score, options.threshold, meaning, "--threshold", tokens)
    said = f"calibrated, {promise['kind']} {promise['target']:g}"
    if not why and options.limits.max_tokens < tokens:
        # What ends in time means what it meant, but more answers are cut off.
        here = options.limits.max_tokens
        why = f"on longer replies: up to {tokens} tokens, here --max-tokens {here}"
    said = f"{said}, but {why}" if why else said
    return Rule(score, promise["threshold"], meaning, said, tokens)


def _why_otherwise(options: Options, ref: ModelRef) -> str:
    """Why models that think otherwise than in the run are not those that were calibrated."""
    assert ref.config is not None  # it was calibrated: it is a run's
    known = ref.config.generation
    changed = any(getattr(known, name) != value for name, value in options.thoughts.changes.items())
    return "the models think otherwise than in the run" if changed else ""
