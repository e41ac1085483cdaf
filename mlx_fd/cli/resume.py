"""``mlx-fd resume``."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_fd.cli.options import PathType, debug_option, json_option, quiet_option, track_option
from mlx_fd.cli.run_command import run_command
from mlx_fd.runs.tracking import check_installed


@click.command(
    short_help="Continue a stopped run exactly where it stopped.",
    epilog="""\b
Examples:
  mlx-fd resume runs/20260101-120000
  mlx-fd resume runs/20260101-120000 --track tensorboard
  mlx-fd resume runs/20260101-120000 --redo-from-checkpoint
""",
)
@click.argument("run", type=PathType())
@click.option(
    "--redo-from-checkpoint",
    "redo",
    is_flag=True,
    help="If checkpoints are missing or damaged, redo everything after the newest intact one (or "
    "the whole run). The files it replaces are kept in RUN/cut.",
)
@click.option(
    "--allow-code-execution",
    "allowed",
    is_flag=True,
    help="Run programs that models write, as the run did: it is asked for anew.",
)
@track_option
@json_option
@quiet_option
@debug_option
def resume(
    run: Path,
    redo: bool,
    allowed: bool,
    trackers: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Continue a stopped run exactly where it stopped.

    RUN is a run directory of `mlx-fd loop`, `self-distill` or `distil`; the exit status is theirs.
    A run whose checkpoints are missing or damaged is left unchanged, and a message says what to do.
    """
    check_installed(trackers)
    from mlx_fd.problems import execution
    from mlx_fd.runs.mirror import own_folder
    from mlx_fd.training.planning import resumed_plan

    if allowed:
        execution.allow()
    with own_folder(run, new=False) as own, resumed_plan(own, redo=redo) as (plan, warnings):
        run_command(own, plan, warnings, trackers, as_json, quiet, new=False, redo=redo)
