"""The command line: parsing, calling, printing.

Heavy imports are made inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback

import click

from mlx_fd._version import __version__
from mlx_fd.cli.advantage import advantage
from mlx_fd.cli.cascade import cascade
from mlx_fd.cli.compare import compare
from mlx_fd.cli.distil import distil
from mlx_fd.cli.doctor import doctor
from mlx_fd.cli.eval import evaluate
from mlx_fd.cli.export import export
from mlx_fd.cli.feedback import feedback
from mlx_fd.cli.loop import loop
from mlx_fd.cli.models import models
from mlx_fd.cli.output import lasting_output
from mlx_fd.cli.pareto import pareto
from mlx_fd.cli.report import report
from mlx_fd.cli.resume import resume
from mlx_fd.cli.self_distill import self_distill
from mlx_fd.cli.serve import serve
from mlx_fd.cli.signals import Stopped, interruptible
from mlx_fd.cli.tutor import tutor
from mlx_fd.errors import UserError
from mlx_fd.models import ranks
from mlx_fd.models.device_memory import what_gave_out
from mlx_fd.text import shown, strip_control_chars

# What several processes do together; all else each would do for itself.
_IN_SEVERAL_PROCESSES = ("loop", "distil", "self-distill", "resume")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  mlx-fd doctor                                 check this machine
  mlx-fd loop --expert qwen2.5-7b-4bit          train a student
  mlx-fd loop --expert smollm2-135m --preset quick
  mlx-fd resume runs/20260101-120000            continue a stopped run
""",
)
@click.version_option(__version__, prog_name="mlx-fd")
@click.pass_context
def cli(context: click.Context) -> None:
    """Online Feedback Distillation with MLX.

    A large expert solves problems and criticises its own solutions; meanwhile a small student is
    trained to give the same feedback.
    """
    if ranks.launched() and context.invoked_subcommand not in _IN_SEVERAL_PROCESSES:
        raise UserError(
            f"mlx-fd {context.invoked_subcommand} runs in one process: start it without mlx.launch"
        )


for _command in (
    *(loop, distil, self_distill, resume, evaluate, pareto, report, feedback, advantage),
    *(cascade, serve, tutor, export, compare, models, doctor),
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; a user sees messages, and tracebacks only with ``--debug``."""
    with lasting_output():
        status = _run()
    sys.exit(status)


def _run() -> int:
    """Run the command line; the exit status."""
    try:
        _check_utf8(sys.argv[1:])
        with interruptible():
            cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Stopped as error:
        click.echo(strip_control_chars(str(error)), err=True)
        return error.status
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        text, status = _message(error)
        text = text if ranks.first() else f"rank {ranks.rank()}: {text}"
        click.echo(f"error: {strip_control_chars(text)}", err=True)
        return status
    return 0


def _check_utf8(arguments: list[str]) -> None:
    """Refuse bytes that no file of a run, and no model, could hold.

    Raises:
        UserError: an argument has bytes that are not UTF-8.
    """
    for place, argument in enumerate(arguments):
        option, is_long, value = argument.partition("=")
        if is_long and option.startswith("--"):
            where = option
        else:
            after = arguments[place - 1] if place else ""
            where, value = (after if after.startswith("--") else "an argument"), argument
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where} {shown(value)}: this is not UTF-8 text; write the text in UTF-8, or "
                "rename the file"
            ) from None


def _message(error: Exception) -> tuple[str, int]:
    """What the user is told of an error, and the exit status."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}", 2
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        # Of the current directory, for instance, which is part of every whole path.
        return (
            f"{shown(error.object)}: this name is not UTF-8 text, and a run's files hold names as "
            "UTF-8; rename it"
        ), 2
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return (
            "there is no home directory here: a path begins with ~NAME of nobody, or this user has "
            "none and HOME is not set; write the path out, or set HOME"
        ), 2
    if isinstance(error, RuntimeError | MemoryError) and (said := what_gave_out(error)) is not None:
        return (
            f"a computation was too large ({said}). Memory ran out, or macOS ended a long one "
            "because a display was on (let it sleep); take a smaller --batch-size, shorter texts, "
            "or a model in fewer bits"
        ), 2
    return (
        f"{type(error).__name__}: {error}\nThis is a bug in mlx-fd. Re-run with --debug and open "
        "an issue: https://github.com/mlx-fd/mlx-fd/issues"
    ), 1
