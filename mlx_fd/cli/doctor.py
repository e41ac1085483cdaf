"""``mlx-fd models`` and ``mlx-fd doctor``: what can be used here."""

from __future__ import annotations

import json
import sys

import click

from mlx_fd.cli.options import debug_option, json_option


@click.command(
    short_help="Check this machine: versions, backend, memory, models.",
    epilog="""\b
Examples:
  mlx-fd doctor
  mlx-fd doctor --json
  mlx-fd doctor --kernels                     first thing on a new Mac or GPU
""",
)
@click.option(
    "--kernels",
    "of_kernels",
    is_flag=True,
    help="Run the Metal or CUDA kernels on small inputs and print their numerical errors.",
)
@json_option
@debug_option
def doctor(of_kernels: bool, as_json: bool, debug: bool) -> None:
    """Check what this machine has and what to install. Exits with 1 if a check fails."""
    from mlx_fd.cli.checks import checks, checks_table, kernel_rows

    rows = kernel_rows() if of_kernels else checks()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        from mlx_fd.cli.terminal.layout import print_whole

        print_whole(Console(), checks_table(rows))
    if any(row["state"] == "bad" for row in rows):
        sys.exit(1)
