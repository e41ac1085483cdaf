"""``mlx-fd feedback``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mlx_fd.cli.options import (
    Count,
    Number,
    chosen_model,
    debug_option,
    json_option,
    model_options,
)
from mlx_fd.errors import UserError
from mlx_fd.text import strip_control_chars


@click.command(
    short_help="Score and criticise an answer with a distilled student.",
    epilog="""\b
Examples:
  mlx-fd feedback runs/20260101-120000 --problem "Tom has 3 apples and buys 5. How many?" \\
      --answer "3 + 5 = 9. #### 9"
  mlx-fd feedback qwen2.5-1.5b-4bit --problem @problem.txt --answer - < answer.txt
""",
)
@model_options("model")
@click.option("--problem", required=True, help="The problem; @FILE reads a file, - standard input.")
@click.option("--answer", required=True, help="The answer to judge; likewise.")
@click.option(
    "--tokens",
    "--max-tokens",
    "tokens",
    type=Count(),
    default=192,
    show_default=True,
    help="Maximum tokens of the feedback.",
)
@click.option(
    "--temperature",
    "--temp",
    "temperature",
    type=Number(0),
    default=0.0,
    show_default=True,
    help="Sampling temperature of the feedback; 0 is greedy.",
)
@json_option
@debug_option
def feedback(
    model: str | None,
    model_option: str | None,
    adapter_path: Path | None,
    problem: str,
    answer: str,
    tokens: int,
    temperature: float,
    as_json: bool,
    debug: bool,
) -> None:
    """Score and criticise an answer with a distilled student.

    MODEL is a run directory (its best checkpoint), one of its checkpoints, or any model.
    """
    from mlx_fd.models.backend import backend

    name = chosen_model(model, model_option, adapter_path)
    backend()
    if problem == answer == "-":
        raise UserError("--problem - and --answer -: only one of them can be standard input")
    question, text = _text(problem, "--problem"), _text(answer, "--answer")
    from mlx_fd.feedback.judge import give_feedback, locate_model

    ref = locate_model(name, adapter_path)
    found = give_feedback(ref, question, text, tokens, temperature)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name in ("score", "written_score"):
        if name in found:
            value = "none could be read" if found[name] is None else f"{found[name]:+.2f}"
            click.echo(f"{name.replace('_', ' ')}: {value}")
    click.echo(strip_control_chars(found["feedback"]))


def _text(value: str, option: str) -> str:
    """An option's text: itself, a file's after @, or standard input for -."""
    try:
        if value == "-":
            # As bytes: what they mean is not the locale's to say.
            stdin = getattr(sys.stdin, "buffer", None)
            text = sys.stdin.read() if stdin is None else stdin.read().decode("utf-8-sig")
        elif value.startswith("@"):
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8-sig")
        else:
            text = value
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {value}: cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} {value}: cannot be read: it is not UTF-8 text (at byte {error.start}); save "
            "it as UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{option}: is empty")
    return text.strip()
