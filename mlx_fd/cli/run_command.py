"""What the commands that make a run have in common: a run from its display to its end."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.signals import Stopped, explain_memory_error, stopping_on_signals
from mlx_fd.runs.tracking import Tracking

if TYPE_CHECKING:
    from mlx_fd.runs.plan import Plan


@dataclass(frozen=True)
class Job:
    """What is the kind's own in a run that passed every check.

    Attributes:
        models: which models, in words.
        opened: loads the models, and gives what runs: of a report and a stop, a summary or
            ``None``.
        display: takes a console and ``quiet``.
        table: of the summary.
        readme: of the run directory.
    """

    models: str
    opened: Callable[[], Callable[..., dict[str, Any] | None]]
    display: Callable[..., Any]
    table: Callable[[Any], Any]
    readme: str


def new_folder() -> Path:
    """A run directory of this second that is not there yet."""
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    return folder


def _stopping(folder: Path) -> str:
    return (
        "stopping after this batch; Ctrl-C again ends it at once, without this batch. Either way "
        f"go on with: mlx-fd resume {shlex.quote(str(folder))}"
    )


def run_command(
    folder: Path,
    plan: Plan,
    job: Job,
    warnings: list[str],
    trackers: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    *,
    new: bool,
) -> None:
    """Run, show it, and print what came of it.

    Args:
        folder: the run directory; where the run is not ``new`` it is there, and its lock is held.
        plan: what is run.
        job: what is the kind's own in it.
        warnings: what the user should know before it begins, beside the plan's notes.
        trackers: names from :data:`mlx_fd.runs.tracking.TRACKERS`.
        as_json: print the summary as JSON.
        quiet: warnings and the result only.
        new: the run begins.

    Raises:
        Stopped: a signal ended it, and it can go on.
        UserError: something has to be mended first.
    """
    from rich.console import Console

    from mlx_fd import runs
    from mlx_fd.config import to_toml
    from mlx_fd.models.backend import backend
    from mlx_fd.models.fingerprint import time_note
    from mlx_fd.runs.events import Event, Note, Warned

    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(job.display(console, quiet=quiet))
        display(Note(f"run directory: {folder}"))
        display(Note(f"{job.models}, {backend().device}"))
        if note := time_note():
            display(Note(note))
        for text in (*plan.notes, *warnings):
            display(Warned(text))
        if backend().device == "metal":
            display(
                Note("a sleeping Mac stops the run: `caffeinate -is mlx-fd ...` keeps it awake")
            )
        run = job.opened()

        def say(text: str) -> None:
            # Whatever else is not printed: it says how the run goes on.
            if quiet:
                click.echo(text, err=True)
            display(Note(text))
            # A second Ctrl-C ends the process, panel and all.
            console.show_cursor()

        stopped = stack.enter_context(stopping_on_signals(say, _stopping(folder)))
        if new:
            # Only now: models that cannot be loaded leave no run behind.
            stack.enter_context(runs.locked(folder))
            with runs.wrap_write_errors(folder):
                runs.create(folder, to_toml(plan.config), plan.manifest, job.readme)
        tracking = stack.enter_context(
            Tracking(trackers, folder, plan.manifest["options"], lambda text: display(Warned(text)))
        )

        def report(event: Event) -> None:
            for listener in (display, tracking):
                listener(event)

        try:
            summary = run(report, lambda: bool(stopped))
        except RuntimeError as error:
            raise explain_memory_error(error, folder) from error
    if as_json:
        result = {"run": str(folder), "done": summary is not None, **(summary or {})}
        click.echo(json.dumps(result, indent=2))
    if summary is None:
        raise Stopped(folder, "stopped", stopped)
    if not as_json:
        console.print(job.table(summary))
        click.echo(f"everything is in {folder}")


def run_loop(
    folder: Path,
    plan: Plan,
    warnings: list[str],
    trackers: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    *,
    new: bool,
    redo: bool = False,
) -> None:
    """Begin a run of ``mlx-fd loop`` or go on with one, and show it.

    Args:
        folder: the run directory.
        plan: what is run; every check is passed, nothing large is loaded.
        warnings: what the user should know before it begins, beside the plan's notes.
        trackers: names from :data:`mlx_fd.runs.tracking.TRACKERS`.
        as_json: print the summary as JSON.
        quiet: print warnings and the result only.
        new: the run begins.
        redo: do again what no whole checkpoint holds.
    """
    from mlx_fd.cli.terminal.run import Display, summary_table
    from mlx_fd.evaluation.exam import exam_questions
    from mlx_fd.feedback.pair import open_pair
    from mlx_fd.runs import README
    from mlx_fd.training.loop import run

    config = plan.config

    def opened() -> Callable[..., Any]:
        pair = open_pair(plan)
        questions = exam_questions(config)
        return lambda report, stop: run(
            folder, config, pair, plan.probe, plan.problems, report, stop, questions, redo=redo
        )

    names = f"expert {config.models.expert}, student {config.models.student}"
    job = Job(names, opened, Display, summary_table, README)
    run_command(folder, plan, job, warnings, trackers, as_json, quiet, new=new)
