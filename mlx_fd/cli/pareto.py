"""``mlx-fd pareto``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fd.cli.options import NameList, PathType, debug_option, json_option, quiet_option
from mlx_fd.cli.signals import Stopped, stopping_on_signals
from mlx_fd.evaluation.pareto.names import COSTS, METRICS
from mlx_fd.registry import LOSSES

if TYPE_CHECKING:
    from mlx_fd.config import Config
    from mlx_fd.runs.records.pareto import ParetoFile, ParetoPointRow


@click.command(
    short_help="Choose a stopping threshold from one full-length run.",
    epilog="""\b
Examples:
  mlx-fd pareto runs/always               a run of: mlx-fd loop --gate always
  mlx-fd pareto runs/always --cost teacher_tokens --objectives lm,score
  mlx-fd pareto runs/always --exam        examine the student at each stop
  mlx-fd pareto runs/always --sweep       train with each threshold to check
""",
)
@click.argument("run", type=PathType())
@click.option(
    "--cost",
    type=click.Choice(list(COSTS)),
    default=next(iter(COSTS)),
    show_default=True,
    help="Training cost: tokens of the expert's feedbacks, optimiser steps, tokens trained on, or "
    "seconds.",
)
@click.option(
    "--objectives",
    type=NameList(lambda: (*LOSSES, *METRICS)),
    help="Losses and metrics to trade off against the cost. [default: all losses; with --exam also "
    "first_error_f1 and solved]",
)
@click.option(
    "--exam",
    is_flag=True,
    help="Examine the student at each stop that has a checkpoint, on questions of the validation "
    "split, which no evaluation reports (where the truth about answers is known: --problems "
    "arithmetic; keep checkpoints with --checkpoint-every 1 --keep-checkpoints N).",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Also train a run with each threshold, in RUN/sweep, and compare. Repeat the command to "
    "continue a stopped sweep.",
)
@json_option
@quiet_option
@debug_option
def pareto(
    run: Path,
    cost: str,
    objectives: list[str] | None,
    exam: bool,
    sweep: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Choose a stopping threshold from one full-length run.

    RUN is the directory of a run with `--gate always`. The gate is replayed on it for every
    stop_threshold: where it would have stopped, the cost up to there, and the held-out losses
    there. The knee of the Pareto frontier is recommended. Writes pareto.json, pareto.svg and
    pareto.toml (for `mlx-fd loop --config`) into RUN.
    """
    from rich.console import Console

    from mlx_fd.cli.terminal.frontier import summary, table
    from mlx_fd.cli.terminal.layout import output_console, print_whole
    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.evaluation.pareto.choice import PRESET, judge, objectives_of
    from mlx_fd.evaluation.pareto.curve import read_curve
    from mlx_fd.evaluation.pareto.points import points_of
    from mlx_fd.report.frontier import PLOT

    curve = read_curve(run)
    points = points_of(run, curve)
    notes: list[str] = []
    if exam:
        from mlx_fd.models.backend import backend

        backend()
        from mlx_fd.evaluation.pareto.exam import examine_points

        with Steps(Console(stderr=True), quiet=quiet) as steps:
            points, notes = examine_points(run, curve, points, steps)
    names = objectives_of(points, cost, objectives or ())
    found = judge(run, curve, points, names)
    found["notes"] += notes
    _write(run, found, curve.config)
    if sweep:
        # What was traded off, too: what comes of the sweep is judged by it.
        asked = ["--cost", cost]
        asked += ["--objectives", ",".join(objectives)] if objectives else []
        asked += ["--exam"] if exam else []
        command = shlex.join(["mlx-fd", "pareto", "--sweep", *asked])
        found["points"] = _swept(run, found, curve.config, command, quiet)
        _write(run, found, curve.config)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not quiet:
        print_whole(output_console(), table(found))
    for note in found["notes"]:
        click.echo(f"note: {note}")
    click.echo(summary(found))
    click.echo(
        f"mlx-fd loop --config {shlex.quote(str(run / PRESET))}   stops there; the plot "
        f"is {run / PLOT}"
    )


def _write(run: Path, found: ParetoFile, config: Config) -> None:
    from mlx_fd import runs
    from mlx_fd.evaluation.pareto.choice import write
    from mlx_fd.files import clear_unfinished
    from mlx_fd.report.frontier import PLOT, plot

    with runs.wrap_write_errors(run, "free some space, then run the same command again."):
        clear_unfinished(run)
        write(run, found, config)
        plot(found, run / PLOT)


def _swept(
    run: Path, found: ParetoFile, config: Config, command: str, quiet: bool
) -> list[ParetoPointRow]:
    from rich.console import Console

    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.evaluation.pareto.sweep import sweep

    console = Console(stderr=True)

    def say(text: str) -> None:
        click.echo(text, err=True)
        console.show_cursor()

    text = "stopping after this batch; run the same command again to continue"
    with (
        Steps(console, quiet=quiet) as steps,
        stopping_on_signals(say, text) as came,
    ):
        points = sweep(run, config, found, steps, came)
    if points is None:
        raise Stopped(run, "stopped", came, command)
    return points
