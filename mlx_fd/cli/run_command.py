"""What the commands that make a run have in common: a run from its display to its end."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.signals import Stopped, stopping_on_signals
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.models import ranks

if TYPE_CHECKING:
    from mlx_fd.config import Config
    from mlx_fd.runs.plan import Plan


def begin(
    out: Path | None, config: Config, trackers: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Check a new run, then :func:`run_command`.

    Args:
        out: the run directory; ``None``: one of this second.
        config: of the run.
        trackers: names from :data:`mlx_fd.runs.tracking.TRACKERS`.
        as_json: print the summary as JSON.
        quiet: warnings and the result only.
    """
    from mlx_fd.runs.mirror import own_folder
    from mlx_fd.training.planning import new_folder, new_plan

    with contextlib.ExitStack() as stack:
        folder = out or stack.enter_context(new_folder())
        own = stack.enter_context(own_folder(folder, new=True))
        run_command(own, new_plan(own, config), [], trackers, as_json, quiet, new=True)


def _stopping(folder: Path, config: Config) -> str:
    command, when = ranks.command("mlx-fd resume"), "after this batch"
    what = "it"
    if config.generation.batching == CONTINUOUS:
        when, what = "at the next checkpoint", "what was done since the last one"
    return (
        f"stopping {when}; Ctrl-C again stops at once and discards {what}. To continue: "
        f"{command} {shlex.quote(str(folder))}"
    )


def run_command(
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
    """Run, show it, and print what came of it.

    Args:
        folder: the run directory; where the run is not ``new`` it is there, and its lock is held.
        plan: what is run.
        warnings: what the user should know before it begins, beside the plan's notes.
        trackers: names from :data:`mlx_fd.runs.tracking.TRACKERS`.
        as_json: print the summary as JSON.
        quiet: warnings and the result only.
        new: the run begins.
        redo: go back to the newest whole checkpoint, whatever was done after it.

    Raises:
        Stopped: a signal ended it, and it can go on.
        UserError: something has to be mended first.
    """
    if not ranks.first():
        _run_unseen(folder, plan, new=new, redo=redo)
        return
    from rich.console import Console

    from mlx_fd.cli.terminal.layout import print_whole
    from mlx_fd.runs.events import Note
    from mlx_fd.training.session import open_run

    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    make_display, table = _views(plan.config)
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(make_display(console, quiet=quiet))
        run = open_run(folder, plan, display, warnings, trackers, new=new, redo=redo)

        def say(text: str) -> None:
            # Whatever else is not printed: it says how the run goes on.
            if quiet:
                click.echo(text, err=True)
            display(Note(text))
            # A second Ctrl-C ends the process, panel and all.
            console.show_cursor()

        stopped = stack.enter_context(stopping_on_signals(say, _stopping(folder, plan.config)))
        summary = run(lambda: bool(stopped))
    if as_json:
        result = {"run": str(folder), "done": summary is not None, **(summary or {})}
        click.echo(json.dumps(result, indent=2))
    if summary is None:
        # Another rank may have been asked to stop.
        signals = stopped or [signal.SIGTERM]
        raise Stopped(folder, "stopped", signals, ranks.command("mlx-fd resume"))
    if not as_json:
        print_whole(console, table(summary))
        click.echo(f"results: {folder}")


def _run_unseen(folder: Path, plan: Plan, *, new: bool, redo: bool) -> None:
    """Run as one of several ranks that is not the first, which shows the run and says how it ends.

    Args:
        folder: this rank's copy of the run directory.
        plan: what is run.
        new: the run begins.
        redo: as for :func:`run_command`.

    Raises:
        SystemExit: it was stopped.
        UserError: something has to be mended first.
    """
    from mlx_fd.training.session import open_run

    run = open_run(folder, plan, lambda event: None, new=new, redo=redo)
    with stopping_on_signals(lambda text: None, "") as stopped:
        summary = run(lambda: bool(stopped))
    if summary is None:
        sys.exit(128 + (stopped or [signal.SIGTERM])[0])


def _views(config: Config) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """The display of a run and the table of its summary."""
    if config.self_distils:
        from mlx_fd.cli.terminal import self_distillation

        has_context = config.selfdistill.context != "none"
        table = functools.partial(self_distillation.summary_table, has_context=has_context)
        return self_distillation.SelfDisplay, table
    from mlx_fd.cli.terminal.run import Display
    from mlx_fd.cli.terminal.summary import summary_table

    if config.episode.warm_up:
        from mlx_fd.cli.terminal.warm_up import WarmUpDisplay

        return WarmUpDisplay, summary_table
    return Display, summary_table
