"""The warm-up of a loop: answers are distilled into its student before the first batch.

A student that cannot answer cannot judge. The warm-up is a run of ``mlx-fd distil`` in a folder of
the loop's run directory, on the loop's own models, with problems of its own; it is resumed,
reported and evaluated as any such run. The loop begins with the weights that it ends with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_fd import runs
from mlx_fd.config import Config, Method, to_toml
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.student import ADAPTER_WEIGHTS, Student, read_trained
from mlx_fd.runs.events import Event, Note, WarmedUp, Warned
from mlx_fd.runs.learned import question_digests
from mlx_fd.runs.manifest import check_same, flat_options
from mlx_fd.runs.mirror import copy_from_first
from mlx_fd.runs.plan import Plan, check_run_memory
from mlx_fd.runs.records.manifest import Manifest
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.tracking import Tracking
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill import training
from mlx_fd.training.selfdistill.batch import Models
from mlx_fd.training.selfdistill.combination import check_combination
from mlx_fd.training.selfdistill.methods import EXPERT_METHODS, configured
from mlx_fd.training.selfdistill.plan import readme, side_by_side
from mlx_fd.training.selfdistill.ungraded import check_gold

DISTIL, _ON_POLICY = "distil", "on-policy"


def warm_up_config(config: Config) -> Config:
    """The configuration of a loop's warm-up: the method's, with the loop's models and sizes.

    Entries of ``[selfdistill]`` that are not the defaults win over the method's.

    Raises:
        UserError: an unknown method, or options that cannot be distilled with.
    """
    name = config.episode.warm_up_method
    method = _ON_POLICY if name == DISTIL else name
    if method not in EXPERT_METHODS:
        raise UserError(
            f"--warm-up {config.episode.warm_up}: there is no method {name!r} (there are: "
            f"{', '.join((DISTIL, *EXPERT_METHODS))})"
        )
    usual = configured(method, {"expert": config.models.expert})
    given = {
        field.name: value
        for field in dataclasses.fields(Method)
        if (value := getattr(config.selfdistill, field.name)) != field.default
    }
    # The same step of the model's weights as with the scale that the rate belongs to.
    rate = usual.training.lora_rate * usual.models.lora_scale / (config.models.lora_scale or 1.0)
    found = dataclasses.replace(
        usual,
        models=config.models,
        problems=dataclasses.replace(config.problems, episodes=config.episode.warm_up_problems),
        generation=config.generation,
        training=dataclasses.replace(
            usual.training,
            lora_rate=config.episode.warm_up_rate or rate,
            max_grad_norm=config.training.max_grad_norm,
            micro_batch=config.training.micro_batch,
            grad_checkpoint=config.training.grad_checkpoint,
        ),
        episode=dataclasses.replace(
            config.episode,
            warm_up="",
            warm_up_rate=0.0,
            exam_size=0,
            probe_every=usual.episode.probe_every,
        ),
        selfdistill=dataclasses.replace(usual.selfdistill, **given),
    )
    check_combination(found)
    return found


def check_warm_up(plan: Plan) -> Plan:
    """A loop's plan with what its warm-up needs.

    Raises:
        UserError: the warm-up cannot be done with these options or models, or the memory does not
            do.
    """
    config = warm_up_config(plan.config)
    if not plan.vocab:
        raise UserError(
            "expert and student have different tokenizers, and a warm-up distils answers token by "
            "token: leave --warm-up out, or choose a student of the expert's family"
        )
    check_gold(config, (*plan.probe, *plan.warm_up))
    questions = [problem.question for problem in (*plan.probe, *plan.warm_up)]
    questions *= config.selfdistill.num_generations
    memory = check_run_memory(
        plan.expert_path, plan.student_path, questions, side_by_side(config), plan.template
    )
    return dataclasses.replace(plan, memory=max(plan.memory, memory.total))


def run_warm_up(
    folder: Path,
    plan: Plan,
    pair: Pair,
    report: Callable[[Event], None],
    stop: Callable[[], bool],
    *,
    trackers: Sequence[str] = (),
    redo: bool = False,
) -> SelfSummary | None:
    """Begin the warm-up, go on with it, or take what it ended with; the student is changed.

    Args:
        folder: the loop's run directory, whose lock the caller holds.
        plan: the loop's.
        pair: the loop's models, the student untrained.
        report: takes every event.
        stop: asked after each batch.
        trackers: which see the warm-up as a run of its own.
        redo: go back to the newest whole checkpoint, whatever was done after it.

    Returns:
        The warm-up's summary; ``None`` where ``stop`` ended it early.

    Raises:
        UserError: the folder cannot be written, or holds another warm-up.
    """
    config, place = warm_up_config(plan.config), folder / runs.WARM_UP
    manifest: Manifest = {**plan.manifest, "options": flat_options(config)}
    # What a run of its own has in the projection's place. Drawn anew, it is the same at a resume.
    mx.random.seed(config.episode.seed)
    student = Student(pair.student.view, 1, config.models.score_at)
    models = Models(student, pair.student_lm, pair.expert)
    with runs.locked(place):
        if runs.is_run(place):
            for text in check_same(runs.read_manifest(place), manifest, place):
                report(Warned(text))
        else:
            with runs.wrap_write_errors(place):
                asked = question_digests(plan)
                runs.create(place, to_toml(config), manifest, readme(config), asked)
        with Tracking(
            trackers, place, manifest["options"], lambda text: report(Warned(text))
        ) as tracking:

            def report_and_track(event: Event) -> None:
                for listener in (report, tracking):
                    listener(event)

            options = config.selfdistill
            report(
                Note(
                    f"warm-up: {options.method} on {len(plan.warm_up)} problems, objective "
                    f"{options.objective}, rate {config.training.lora_rate:g}"
                )
            )
            job = Job(place, config, plan.probe, plan.warm_up, report_and_track, stop, redo)
            summary = training.run(job, models)
    if summary is None:
        return None
    # Also where the warm-up ended in another process.
    trained = place / runs.CHECKPOINTS / "last" / ADAPTER_WEIGHTS
    copy_from_first(trained)
    weights = read_trained(trained)
    pair.student_lm.model.load_weights(list(weights.items()), strict=False)
    mx.eval(pair.student_lm.model.parameters())
    report(WarmedUp(summary))
    return summary
