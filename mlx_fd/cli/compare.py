"""``mlx-fd compare``."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from mlx_fd.cli.options import (
    Count,
    LateOption,
    PathType,
    debug_option,
    json_option,
    quiet_option,
)
from mlx_fd.registry import SOURCES


@click.command(
    short_help="Check that engines reproduce an exported model's outputs.",
    epilog="""\b
Examples:
  mlx-fd compare student-gguf                    every engine available here
  mlx-fd compare student student-gguf.tar --engine mlx --engine llama.cpp
  mlx-fd compare student-hf --engine openai:http://gpu-box:8000   a server
  mlx-fd compare student --problems gsm8k --limit 200 --out comparison
""",
)
@click.argument("exports", nargs=-1, required=True, type=PathType())
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="ENGINE",
    help="mlx, llama.cpp, or openai:URL for a server (openai:URL#MODEL if it serves several "
    "models; timeout 300 seconds per request); repeatable. [default: mlx and llama.cpp, if they "
    "can open the export]",
)
@click.option(
    "--problems",
    metavar="SOURCE",
    cls=LateOption,
    late_help=lambda: (
        f"Problems to answer: {', '.join(SOURCES)}, a file or a hub dataset. [default: the "
        "bundle's, which the reference model answered too]"
    ),
)
@click.option(
    "--limit",
    type=Count(0),
    metavar="N",
    help="Answer only the first N problems. [default: all of the bundle's, 100 of --problems]",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "float", "quantized"]),
    default="auto",
    show_default=True,
    help="Tolerances to apply. auto: according to the file; float for a server.",
)
@click.option("--skip-bad-rows", is_flag=True, help="Skip rows of --problems that cannot be read.")
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Write compare.json and compare.html to this directory.",
)
@json_option
@quiet_option
@debug_option
def compare(
    exports: tuple[Path, ...],
    engines: tuple[str, ...],
    problems: str | None,
    limit: int | None,
    weights: str,
    skip_bad_rows: bool,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Check that other engines reproduce an exported model's outputs.

    EXPORTS are directories written by `mlx-fd export` with a parity bundle, or their .tar archives.
    Each engine runs the bundle in a separate process. Exits with 1 if an engine does not reproduce
    the model.
    """
    from rich.console import Console

    from mlx_fd.cli.terminal.comparison import print_comparison
    from mlx_fd.cli.terminal.layout import output_console
    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.export import compare as comparison
    from mlx_fd.report.comparison_page import report_folder, write_report

    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(comparison.opened(path)) for path in exports]
        names = dict(zip(folders, map(str, exports), strict=True))
        jobs = comparison.plan(folders, engines, names)
        asked = comparison.questions(
            problems,
            limit,
            skip_bad_rows=skip_bad_rows,
            warn=lambda text: click.echo(f"warning: {text}", err=True),
        )
        if out is not None:
            stack.enter_context(report_folder(out))
        # Of all exports before the first is run.
        questions = [asked(job) for job in jobs]
        rows: list[comparison.Row] = []
        try:
            with Steps(Console(stderr=True), quiet=quiet) as steps:
                for job, some in zip(jobs, questions, strict=True):
                    done = comparison.run(job, some, steps, debug=debug)
                    rows.append(comparison.judged(job, done, weights))
        except KeyboardInterrupt:
            if rows and not as_json:
                print_comparison(rows, output_console())
            raise
        found = comparison.report(jobs, rows)
        # First the result, which a report that cannot be written must not cost.
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            print_comparison(rows, output_console())
        if out is not None:
            write_report(found, out)
            if not as_json:
                click.echo(f"wrote {out / 'compare.html'} and compare.json")
    if not found["parity"]:
        sys.exit(1)
