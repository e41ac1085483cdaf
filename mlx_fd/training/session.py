"""A run from its configuration to its end, for the command line and for Python alike.

What can fail is checked first, then the models are loaded, and only then is there a run directory:
models that cannot be loaded leave no run behind.
"""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd import runs
from mlx_fd.config import Config, to_toml
from mlx_fd.errors import UserError
from mlx_fd.files import remove
from mlx_fd.models import ranks
from mlx_fd.models.device_memory import what_gave_out
from mlx_fd.problems import execution
from mlx_fd.runs.continued import loop_configuration
from mlx_fd.runs.events import Event, Note, Step, Warned
from mlx_fd.runs.learned import question_digests
from mlx_fd.runs.mirror import own_folder
from mlx_fd.runs.plan import Plan, sample_of_problems
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.records.summary import Summary
from mlx_fd.runs.tracking import Tracking, check_installed
from mlx_fd.training.planning import new_folder, new_plan, resumed_plan

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.student import Student

Report = Callable[[Event], None]
Stop = Callable[[], bool]
Totals = Summary | SelfSummary
Run = Callable[[Report, Stop], Totals | None]


def open_run(
    folder: Path,
    plan: Plan,
    report: Report,
    warnings: Sequence[str] = (),
    trackers: Sequence[str] = (),
    *,
    new: bool,
    redo: bool = False,
) -> Callable[[Stop], Totals | None]:
    """Load a plan's models; nothing is written yet.

    Args:
        folder: the run directory; where the run is not ``new`` it is there, and its lock is held.
        plan: what is run.
        report: told of everything worth showing.
        warnings: what the user should know before it begins, beside the plan's notes.
        trackers: names from :data:`mlx_fd.runs.tracking.TRACKERS`.
        new: the run begins.
        redo: go back to the newest whole checkpoint, whatever was done after it.

    Returns:
        What runs it: asks after each batch whether to stop, and gives the summary, ``None`` where
        it was stopped. It makes and locks the directory of a new run.

    Raises:
        UserError: something has to be mended first.
    """
    from mlx_fd.models.backend import backend
    from mlx_fd.models.fingerprint import time_note

    report(Note(f"run directory: {folder}"))
    report(Note(f"{_models_of(plan.config)}, {backend().device}"))
    if note := time_note():
        report(Note(note))
    for text in sample_of_problems(plan.config.problems.problems, plan.problems):
        report(Note(text))
    for text in (*plan.notes, *warnings):
        report(Warned(text))
    if backend().device == "metal":
        report(Note("a sleeping Mac stops the run: `caffeinate -is mlx-fd ...` keeps it awake"))
    import mlx.core as mx

    from mlx_fd.models.device_memory import limit_memory

    limit_memory(plan.memory)
    # The summary names this run's peak, not that of another one in this process.
    mx.reset_peak_memory()

    def opened() -> tuple[Run, str, list[str], Student | None]:
        return _opened(folder, plan, report, trackers, redo=redo)

    # A divided expert is tried on a few tokens, for which the ranks exchange something themselves.
    sharded = plan.config.models.shard_expert
    run, readme, notes, student = opened() if sharded else ranks.together(opened)
    for note in notes:
        report(Note(note))

    def go(stop: Stop) -> Totals | None:
        with contextlib.ExitStack() as stack:
            if new:
                # Only now: models that cannot be loaded leave no run behind.
                stack.enter_context(runs.locked(folder))
                with runs.wrap_write_errors(folder):
                    runs.check_new(folder)
                    if student is not None and plan.config.models.continue_from:
                        from mlx_fd.training.continuing import keep

                        # Before there is a run: it could neither go on without them nor begin.
                        keep(folder, student)
                    else:
                        remove(folder / runs.BEGUN)
                    asked = question_digests(plan)
                    runs.create(folder, to_toml(plan.config), plan.manifest, readme, asked)
            tracking = stack.enter_context(
                Tracking(
                    trackers, folder, plan.manifest["options"], lambda text: report(Warned(text))
                )
            )

            def report_and_track(event: Event) -> None:
                for listener in (report, tracking):
                    listener(event)

            try:
                return run(report_and_track, lambda: ranks.any_of(stop()))
            except ranks.RankLost as error:
                raise _explain_lost_rank(error, folder) from error
            except RuntimeError as error:
                if ranks.is_lost(error):
                    raise _explain_lost_rank(ranks.lost(error), folder) from error
                raise explain_memory_error(error, folder) from error

    return go


def _models_of(config: Config) -> str:
    models, options = config.models, config.selfdistill
    if not config.self_distils:
        return f"expert {models.expert}, student {models.student}"
    if options.self_teacher == "expert":
        return (
            f"expert {options.critic}, student {models.student}, method {options.method}: "
            f"objective {options.objective}"
        )
    critic = f", critic {options.critic}" if options.critic else ""
    return (
        f"{models.student}{critic}, method {options.method}: context {options.context}, objective "
        f"{options.objective}, teacher {options.self_teacher}"
    )


def _opened(
    folder: Path, plan: Plan, report: Report, trackers: Sequence[str], *, redo: bool
) -> tuple[Run, str, list[str], Student | None]:
    """What runs a plan, its models loaded.

    Also what explains the files of its run directory, what the user should know of the models, and
    a loop's student as it begins.
    ``report`` and ``trackers`` are a warm-up's, which is tracked as a run of its own.
    """
    from mlx_fd.training.job import Job

    config = plan.config

    def job(report: Report, stop: Stop) -> Job:
        return Job(folder, config, plan.probe, plan.problems, report, stop, redo)

    if config.self_distils:
        from mlx_fd.training.selfdistill import training
        from mlx_fd.training.selfdistill.plan import open_models, readme

        models = open_models(plan)
        loaded = [models.student_lm, *([models.critic] if models.critic else [])]
        return (
            lambda report, stop: training.run(job(report, stop), models),
            readme(config),
            _notes(loaded),
            None,
        )
    from mlx_fd.evaluation.exam import exam_questions
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.training import loop

    pair = open_pair(plan)
    if config.models.continue_from:
        from mlx_fd.training.continuing import begin

        begin(folder, plan, pair.student)
    questions = exam_questions(config)
    warm_up: Callable[[Stop], SelfSummary | None] | None = None
    if config.episode.warm_up:
        from mlx_fd.training.warm_up import run_warm_up

        def warm_up(stop: Stop) -> SelfSummary | None:
            return run_warm_up(folder, plan, pair, report, stop, trackers=trackers, redo=redo)

    return (
        lambda report, stop: loop.run(job(report, stop), pair, questions, warm_up=warm_up),
        runs.README,
        _notes([pair.expert, pair.student_lm]),
        pair.student,
    )


def _notes(models: Sequence[Loaded]) -> list[str]:
    """What the user should know of some models, once."""
    return list(dict.fromkeys(note for model in models for note in model.notes))


def _explain_lost_rank(error: ranks.RankLost, folder: Path) -> UserError:
    """What the user is told where a run ends because another rank has."""
    if not ranks.first():
        return error
    command = ranks.command(f"mlx-fd resume {shlex.quote(str(folder))}")
    return UserError(f"{error}. What was saved is whole; go on with: {command}")


def explain_memory_error(error: RuntimeError, folder: Path) -> Exception:
    """What MLX says when the GPU or the memory gives out, with what to do about it."""
    if (said := what_gave_out(error)) is None:
        return error
    return UserError(
        f"a computation was too large ({said}). Memory ran out, or macOS ended a "
        "long one because a display was on (let it sleep). Set micro_batch = 1 and "
        f"grad_checkpoint = true in {folder}/config.toml, then: mlx-fd resume "
        f"{shlex.quote(str(folder))}; or begin a new run with a smaller --batch-size."
    )


# ------------------------------------------------------------------------------ for use in Python


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run directory; :func:`mlx_fd.open_student`, :func:`resume_run` and the commands
            take it.
        summary: what ``summary.json`` holds; ``None`` where ``stop`` ended the run early.
    """

    folder: Path
    summary: Totals | None

    @property
    def done(self) -> bool:
        """Whether the run came to its end; else :func:`resume_run` goes on with it."""
        return self.summary is not None


def _listener(
    on_event: Callable[[Event], None] | None, on_step: Callable[[Step], None] | None
) -> Report:
    def report(event: Event) -> None:
        if isinstance(event, Step):
            if on_step is not None:
                on_step(event)
        elif on_event is not None:
            on_event(event)
        elif isinstance(event, Warned):
            warnings.warn(event.text, stacklevel=2)

    return report


def run_loop(  # noqa: PLR0913
    expert: str | None = None,
    *,
    student: str | None = None,
    problems: str | Path | None = None,
    episodes: int | None = None,
    out: str | Path | None = None,
    preset: str | None = None,
    config: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    stop: Stop = lambda: False,
    track: Sequence[str] = (),
    **options: Any,
) -> RunResult:
    """Distil the expert's feedback into the student while the expert solves problems.

    What ``mlx-fd loop`` does, with the same checks and the same run directory. What is given here
    wins over ``config``, which wins over ``preset``. An interrupt ends it at once;
    :func:`resume_run` goes on.

    Args:
        expert: an alias, a hub name or an mlx-lm directory; ``tiny`` brings its preset.
        student: likewise; ``None``: the expert's default student.
        problems: a source of problems: a name, or a file.
        episodes: problems to go through.
        out: the run directory; ``None``: ``runs/DATE-TIME``.
        preset: a preset's name.
        config: a TOML file with options, for instance an earlier run's ``config.toml``.
        on_event: told of notes, warnings, the probe set and each batch that is done; ``print``
            gives a line of each. ``None``: warnings are Python's.
        on_step: told of the tokens of each step as they are written, for a progress bar.
        stop: asked after each batch; when true, a checkpoint is written and the run ends there.
        track: trackers to send the run's numbers to, ``"tensorboard"`` for instance.
        **options: any other option of docs/reference.md, by its name in the TOML file.

    Returns:
        The run directory and the summary.

    Raises:
        UserError: an option, name, file, pair of models or amount of memory that will not do; or
            the run directory cannot be written.
    """
    check_installed(track)
    given = {
        "expert": expert,
        "student": student,
        "problems": problems,
        "episodes": episodes,
        **options,
    }
    given = {name: str(one) if isinstance(one, Path) else one for name, one in given.items()}
    file = None if config is None else Path(config).expanduser()
    chosen = loop_configuration(preset, file, given, "run_loop")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder()) if out is None else Path(out).expanduser()
        own = stack.enter_context(own_folder(folder, new=True))
        plan = new_plan(own, chosen)
        run = open_run(own, plan, _listener(on_event, on_step), trackers=track, new=True)
        return RunResult(folder, run(stop))


def resume_run(
    folder: str | Path,
    *,
    redo_from_checkpoint: bool = False,
    allow_code_execution: bool = False,
    on_event: Callable[[Event], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    stop: Stop = lambda: False,
    track: Sequence[str] = (),
) -> RunResult:
    """Go on with a run of the loop or of self-distillation exactly where it stopped.

    Args:
        folder: the run directory.
        redo_from_checkpoint: where checkpoints are lost or damaged, do again what came after the
            newest that is whole, or all of the run where there is none.
        allow_code_execution: run programs that models write, where the run's answers are programs.
        on_event: as for :func:`run_loop`, like all that follow.
        on_step: told of the tokens of each step.
        stop: asked after each batch.
        track: trackers.

    Returns:
        The run directory and the summary.

    Raises:
        UserError: no run, not what it began with, or its checkpoints are missing or damaged.
    """
    check_installed(track)
    folder = Path(folder).expanduser()
    report = _listener(on_event, on_step)
    redo = redo_from_checkpoint
    if allow_code_execution:
        execution.allow()
    with (
        own_folder(folder, new=False) as own,
        resumed_plan(own, redo=redo) as (plan, uncertain),
    ):
        run = open_run(own, plan, report, uncertain, track, new=False, redo=redo)
        return RunResult(folder, run(stop))
