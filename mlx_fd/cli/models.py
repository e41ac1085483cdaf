"""``mlx-fd models``."""

from __future__ import annotations

import json

import click

from mlx_fd.cli.options import debug_option, json_option


@click.command(
    short_help="List the models available on this machine.",
    epilog="""\b
Examples:
  mlx-fd models
  mlx-fd models --json
""",
)
@json_option
@debug_option
def models(as_json: bool, debug: bool) -> None:
    """List the known model names, and which models are on this machine."""
    from mlx_fd.models.backend import backend

    backend()
    from mlx_fd.cli.checks import model_rows, models_table

    rows = model_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    from mlx_fd.cli.terminal.layout import print_whole

    print_whole(Console(), models_table(rows))
