"""``mlx-fd feedback``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.options import (
    Count,
    Number,
    PathType,
    chat_template_option,
    chosen_model,
    debug_option,
    given_on_command_line,
    json_option,
    model_options,
    quiet_option,
    text_of,
    thinking_options,
)
from mlx_fd.errors import UserError
from mlx_fd.text import strip_control_chars

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import Judge, ModelRef


@click.command(
    short_help="Score and criticise an answer with a distilled student.",
    epilog="""\b
Examples:
  mlx-fd feedback runs/mine --problem @problem.txt --answer - < answer.txt
  mlx-fd feedback runs/mine --problems answers.jsonl --out judged.jsonl
\b
A student of the tiny pair understands only problems and answers as its
generator writes them (--problems arithmetic); other scores mean nothing:
  printf 'Step 1: <<8+5=14>>14\\n#### 14' |
  mlx-fd feedback runs/mine --answer - --problem \\
      'Tom has 8 apples. Tom buys 5 more. How many apples does Tom have now?'
""",
)
@model_options("model")
@click.option("--problem", help="The problem; @FILE reads a file, - standard input.")
@click.option("--answer", help="The answer to judge; likewise.")
@click.option(
    "--problems",
    "file",
    type=PathType(),
    metavar="FILE",
    help="Judge all answers of a file instead (.jsonl, .json, .csv, .tsv, .parquet): rows with "
    "question (or problem) and answer.",
)
@click.option(
    "--out",
    type=PathType(),
    metavar="FILE",
    help="Where to write its rows, with written_score, readable, feedback and, of a student, "
    "head_score, as JSON lines. The same command goes on after a stop.",
)
@click.option("--overwrite", is_flag=True, help="Write over --out where it is there already.")
@click.option(
    "--batch-size",
    type=Count(),
    default=8,
    show_default=True,
    help="Answers of a file that are judged side by side.",
)
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
@chat_template_option
@thinking_options
@json_option
@quiet_option
@debug_option
def feedback(
    model: str | None,
    model_option: str | None,
    adapter_path: Path | None,
    problem: str | None,
    answer: str | None,
    file: Path | None,
    out: Path | None,
    overwrite: bool,
    batch_size: int,
    tokens: int,
    temperature: float,
    template_kwargs: dict[str, Any] | None,
    thinking: str | None,
    max_thinking_tokens: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Score and criticise an answer, or a file of answers, with a distilled student.

    MODEL is a run directory (its best checkpoint), one of its checkpoints, or any model.
    """
    from mlx_fd.models.backend import backend

    name = chosen_model(model, model_option, adapter_path)
    named = _Named(name, adapter_path, template_kwargs, thinking, max_thinking_tokens)
    if file is None and out is None:
        for option, value in (("--problem", problem), ("--answer", answer)):
            if value is None:
                raise click.UsageError(f"Missing option '{option}'.")
        if of_files := given_on_command_line(("batch_size", "overwrite")):
            raise UserError(
                f"--{of_files[0].replace('_', '-')} has no effect without --problems; leave it out"
            )
        backend()
        _one(
            named,
            (problem or "", answer or ""),
            tokens,
            temperature,
            as_json,
        )
        return
    if problem is not None or answer is not None:
        raise UserError("--problem and --answer are of one answer, --problems and --out of a file")
    if file is None or out is None:
        raise UserError("--problems FILE and --out FILE go together")
    backend()
    options = JudgeOptions(batch_size, tokens, temperature, overwrite)
    _file(named, file, out, options, as_json, quiet)


@dataclass(frozen=True)
class _Named:
    """A model as it was named."""

    name: str
    adapter_path: Path | None
    template_kwargs: dict[str, Any] | None
    thinking: str | None
    max_thinking_tokens: int | None

    def locate(self) -> ModelRef:
        from mlx_fd.feedback.judge import locate_model

        ref = locate_model(self.name, self.adapter_path, self.template_kwargs)
        limit = self.max_thinking_tokens or ref.thinking.limit
        on = ref.thinking.on if self.thinking is None else self.thinking == "on"
        if self.max_thinking_tokens and not on:
            raise UserError(
                "--max-thinking-tokens: nobody thinks; add --thinking on, or leave it out"
            )
        return replace(ref, thinking=replace(ref.thinking, on=on, limit=limit))


def _open(ref: ModelRef) -> Judge:
    """A student in memory, and a word where it does not score with all that it has."""
    from mlx_fd.feedback.judge import open_student

    judge = open_student(ref)
    if judge.left_out:
        click.echo(f"warning: {judge.left_out}", err=True)
    return judge


def _one(
    model: _Named, asked: tuple[str, str], tokens: int, temperature: float, as_json: bool
) -> None:
    problem, answer = asked
    if problem == answer == "-":
        raise UserError("--problem - and --answer -: only one of them can be standard input")
    question, text = text_of(problem, "--problem"), text_of(answer, "--answer")
    from mlx_fd.feedback.judge import check_lengths, give_feedback
    from mlx_fd.feedback.judge_file import judged_columns

    ref = model.locate()
    check_lengths(ref.model, [(question, text)], tokens + ref.thinking.tokens, "--tokens")
    found = judged_columns(give_feedback(_open(ref), question, text, tokens, temperature))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name in ("head_score", "written_score"):
        if name in found:
            value = "none could be read" if found[name] is None else f"{found[name]:+.2f}"
            click.echo(f"{name.replace('_', ' ')}: {value}")
    click.echo(strip_control_chars(found["feedback"]))


@dataclass(frozen=True)
class JudgeOptions:
    """How a file is judged."""

    batch_size: int
    tokens: int
    temperature: float
    overwrite: bool


def _file(
    model: _Named,
    file: Path,
    out: Path,
    options: JudgeOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mlx_fd.feedback.judge import check_lengths
    from mlx_fd.feedback.judge_file import (
        RESERVED,
        Judging,
        check_out_file,
        judge_file,
        partial_of,
    )
    from mlx_fd.problems.files import load_answers

    answers = load_answers(file, RESERVED)
    check_out_file(out, file, overwrite=options.overwrite)
    ref = model.locate()
    pairs = list(zip(answers.problems, answers.answers, strict=True))
    most = options.tokens + ref.thinking.tokens
    check_lengths(ref.model, pairs, most, "--tokens", f"{file}: row")
    console = Console(stderr=True)
    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_interactive,
    )
    try:
        with bar:
            task = bar.add_task("answers judged", total=len(answers.rows))
            rows = judge_file(
                lambda: _open(ref),
                ref,
                answers,
                out,
                Judging(options.tokens, options.batch_size, options.temperature),
                on_progress=lambda done: bar.update(task, completed=done),
            )
    except KeyboardInterrupt:
        click.echo(f"what is judged is in {partial_of(out)}; the same command goes on", err=True)
        raise
    readable = sum(row["readable"] for row in rows)
    if as_json:
        click.echo(json.dumps({"out": str(out), "judged": len(rows), "readable": readable}))
        return
    click.echo(
        f"{len(rows)} answers judged, a written score could be read in {readable}: {out}",
    )
