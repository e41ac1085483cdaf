"""``mlx-fd report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fd.cli.options import Count, PathType, debug_option, json_option, quiet_option
from mlx_fd.errors import UserError

if TYPE_CHECKING:
    from mlx_fd.report.reading import LoopRun
    from mlx_fd.report.self_reading import SelfRun

_FILE = "report.html"


def _counted(run: LoopRun | SelfRun) -> dict[str, int]:
    """How many records a run has, by what they are called."""
    from mlx_fd.report.reading import LoopRun

    if isinstance(run, LoopRun):
        return {"episodes": len(run.episodes)}
    return {"attempts": len(run.attempts)}


@click.command(
    short_help="Write an HTML report of one run or several.",
    epilog="""\b
Examples:
  mlx-fd report runs/20260101-120000
  mlx-fd report runs/20260101-120000 --open
  mlx-fd report runs/seed0 runs/seed1 runs/seed2 --out seeds.html
  mlx-fd report runs/grpo runs/step-critique --out methods.html
""",
)
@click.argument("runs", type=PathType(), nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--out",
    type=PathType(),
    metavar="FILE",
    help="Output file. [default: RUN/report.html; for several runs report.html]",
)
@click.option(
    "--episodes",
    type=Count(),
    metavar="N",
    help="Episodes (self-distillation: attempts) of each run to include, evenly spaced. "
    "[default: all]",
)
@click.option("--open", "opened", is_flag=True, help="Open the report in the browser.")
@json_option
@quiet_option
@debug_option
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    episodes: int | None,
    opened: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write an HTML report of one run, or of several side by side.

    RUN is a run directory of `mlx-fd loop`, `self-distill` or `distil`, finished or not; the runs
    in one report are of the loop, or none is. The report is one self-contained file.
    """
    from rich.console import Console

    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.report.page import check_out, make_page, write_page
    from mlx_fd.report.reading import read_runs
    from mlx_fd.runs import is_ours

    path = out or (Path(_FILE) if len(runs) > 1 else runs[0] / _FILE)
    check_out(path)
    with Steps(Console(stderr=True), quiet=quiet or as_json) as on_progress:
        on_progress("reading", 0, 1)
        found = read_runs(runs)
        if out is None and len(runs) == 1 and not is_ours(runs[0]):
            raise UserError(
                f"{runs[0]}: neither a manifest nor a mark of mlx-fd says that this folder is a "
                "run's, so nothing is written into it; name the page with --out"
            )
        on_progress("reading", 1, 1)
        page = make_page(found, episodes, on_progress)
    write_page(page, path)
    size = path.stat().st_size
    if as_json:
        result = {
            "report": str(path),
            "bytes": size,
            "runs": [
                {
                    "run": str(run.folder),
                    "name": run.name,
                    "finished": run.finished,
                    **_counted(run),
                    "missing": run.missing,
                }
                for run in found
            ],
        }
        click.echo(json.dumps(result, indent=2))
    else:
        for run in found:
            for said in run.missing if not quiet else []:
                click.echo(f"{run.name}: {said}", err=True)
        click.echo(f"{path} ({size / 1e6:.1f} MB)")
    if opened:
        click.launch(path.resolve().as_uri())
