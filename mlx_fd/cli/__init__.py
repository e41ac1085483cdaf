"""The command line: parsing, calling, printing.

Heavy imports are made inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import sys
import traceback

import click

from mlx_fd import __version__
from mlx_fd.cli.analysing import advantage
from mlx_fd.cli.choosing import pareto
from mlx_fd.cli.evaluating import evaluate
from mlx_fd.cli.exporting import compare, export
from mlx_fd.cli.judging import feedback
from mlx_fd.cli.machine import doctor, models
from mlx_fd.cli.reporting import report
from mlx_fd.cli.running import loop, resume
from mlx_fd.cli.selfdistilling import self_distill
from mlx_fd.cli.stopping import Stopped
from mlx_fd.errors import UserError
from mlx_fd.terminal import strip_control_chars


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  mlx-fd doctor                                   what this machine can do
  mlx-fd loop --expert qwen2.5-7b-4bit            the main job
  mlx-fd loop --expert smollm2-135m --preset quick
  mlx-fd resume runs/20260101-120000              goes on where it stopped
""",
)
@click.version_option(__version__, prog_name="mlx-fd")
def cli() -> None:
    """Online Feedback Distillation with MLX.

    A large expert solves problems and criticises its own solutions; a small student learns, while
    that goes on, to give the same feedback.
    """


for _command in (
    *(loop, self_distill, resume, evaluate, pareto, report, feedback, advantage),
    *(export, compare, models, doctor),
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; a user sees messages, and tracebacks only with ``--debug``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character is no reason to end a run.
            stream.reconfigure(errors="replace")
    try:
        cli(standalone_mode=False)
        status = 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except Stopped as error:
        click.echo(strip_control_chars(str(error)), err=True)
        status = error.status
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        text, status = _message(error)
        click.echo(f"error: {strip_control_chars(text)}", err=True)
    sys.exit(status)


def _message(error: Exception) -> tuple[str, int]:
    """What the user is told of an error, and the exit status."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    return (
        f"{type(error).__name__}: {error}\nThis is a defect of mlx-fd; run it again with --debug "
        "and report what it prints."
    ), 1
