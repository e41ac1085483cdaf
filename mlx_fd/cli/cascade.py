"""``mlx-fd cascade``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fd.cli.options import Count, Number, PathType, debug_option, json_option, quiet_option
from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.scores import ANSWER, SCORES

if TYPE_CHECKING:
    from mlx_fd.runs.records.cascade import CascadeFile

_LIMIT = 500
_SHARE = Number(0, 1, min_open=True, max_open=True)


@click.command(
    short_help="Choose when a student passes on to the expert, with a promise.",
    epilog="""\b
Examples:
  mlx-fd cascade calibrate runs/mine --risk 0.1       of its own, 10 % wrong
  mlx-fd cascade calibrate runs/mine --accuracy 0.9   of all, 90 % right
  mlx-fd cascade calibrate runs/mine --cost 0.3       30 % passed on
  mlx-fd cascade calibrate runs/mine --risk 0.1 --score head
  mlx-fd cascade eval runs/mine                       kept on other problems?
  mlx-fd serve --student runs/mine --expert tiny      with that threshold
""",
)
@click.argument("action", type=click.Choice(["calibrate", "eval"]))
@click.argument("run", type=PathType())
@click.option(
    "--risk",
    type=_SHARE,
    metavar="SHARE",
    help="Promise: of the answers that the student keeps, at most this share is wrong.",
)
@click.option(
    "--accuracy",
    type=_SHARE,
    metavar="SHARE",
    help="Promise: of all answers, at least this share is right.",
)
@click.option(
    "--cost",
    type=_SHARE,
    metavar="SHARE",
    help="Promise: of all requests, at most this share is passed on.",
)
@click.option(
    "--score",
    type=click.Choice(list(SCORES)),
    help="What the student's answers are scored by: "
    + "; ".join(f"{score.name}: {score.help}" for score in SCORES.values())
    + f". For calibrate. [default: {ANSWER.name}]",
)
@click.option("--expert", metavar="NAME", help="Who is passed requests. [default: the run's]")
@click.option(
    "--problems",
    metavar="SOURCE",
    help="Held-out problems, as for mlx-fd loop. [default: those the run learned from, if their "
    "source has a name; else gsm8k]",
)
@click.option("--split", default="test", show_default=True, metavar="NAME", help="Dataset split.")
@click.option(
    "--limit",
    type=Count(),
    default=_LIMIT,
    show_default=True,
    metavar="N",
    help="Use at most N problems; eval leaves those of the calibration out.",
)
@json_option
@quiet_option
@debug_option
def cascade(
    action: str,
    run: Path,
    risk: float | None,
    accuracy: float | None,
    cost: float | None,
    score: str | None,
    expert: str | None,
    problems: str | None,
    split: str,
    limit: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Choose when a student passes requests on to the expert, and see what that brings.

    RUN is a run directory. calibrate lets both answer held-out problems and chooses the threshold
    of a score of the student's answers that keeps one promise, --risk, --accuracy or --cost, with
    95 % on problems like those; `mlx-fd serve` takes it from the run. eval holds it
    against other problems, and against the student alone, the expert alone, a lottery and an
    oracle. Both write cascade.json and cascade.svg into RUN. Problems that were answered once are
    not answered again.
    """
    given = {"risk": risk, "accuracy": accuracy, "cost": cost}
    promises = {kind: value for kind, value in given.items() if value is not None}
    if action == "calibrate" and len(promises) != 1:
        raise click.UsageError("calibrate needs one of --risk, --accuracy and --cost.")
    if action == "eval" and (promises or score is not None):
        raise click.UsageError("--risk, --accuracy, --cost and --score are for calibrate.")
    from mlx_fd import runs
    from mlx_fd.models.backend import backend

    if not runs.is_run(run):
        raise UserError(f"{run}: this is no run directory; a cascade needs a run's student")
    backend()
    from rich.console import Console

    from mlx_fd.cli.terminal.cascade import summary, table
    from mlx_fd.cli.terminal.layout import output_console, print_whole, warning
    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.evaluation import running, suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.cascade import file
    from mlx_fd.evaluation.cascade.measuring import Held, calibrate, evaluate
    from mlx_fd.evaluation.target import open_target
    from mlx_fd.models.storage import cache_dir

    # One that cannot be read is made again.
    calibrated = file.read(run) if action == "eval" else None
    if action == "eval" and calibrated is None:
        raise UserError(
            f"{run}: it has no calibration yet; mlx-fd cascade calibrate {shlex.quote(str(run))} "
            "--risk 0.1"
        )
    target = open_target(str(run), expert)
    held = Held(problems, split, limit)
    cache = Cache(cache_dir() / "eval")
    bench = running.make_bench(target, suites.Options(), cache, lambda step, tokens: None)
    console = Console(stderr=True)

    def warn(text: str) -> None:
        console.print(warning(text), soft_wrap=True)

    with Steps(console, quiet=quiet or as_json) as steps:
        if calibrated is not None:
            found = evaluate(bench, held, calibrated, steps, warn)
        else:
            [(kind, value)] = promises.items()
            scored = SCORES[score or ANSWER.name]
            found = calibrate(bench, held, scored, kind, value, steps, warn)
    _write(run, found)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    print_whole(output_console(), table(found["evaluation"] or found["calibration"]))
    click.echo(summary(found))
    if not quiet:
        click.echo(f"results: {run / file.CASCADE}")


def _write(run: Path, found: CascadeFile) -> None:
    from mlx_fd.evaluation.cascade import file
    from mlx_fd.report.cascade import PLOT, plot

    file.write(run, found)
    plot(found["evaluation"] or found["calibration"], run / PLOT)
