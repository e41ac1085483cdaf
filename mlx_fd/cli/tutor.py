"""``mlx-fd tutor``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.options import debug_option, json_option, text_of
from mlx_fd.errors import UserError
from mlx_fd.text import strip_control_chars

if TYPE_CHECKING:
    from mlx_fd.feedback.judge import Judge

_STATES = {
    "right": "This looks right.",
    "wrong": "Not right yet.",
    "unsure": "The student is not sure: its signs contradict each other, or say nothing.",
}
_MARKS = {"right": "right", "wrong": "the first wrong step", "open": "not judged"}
_COLOURS = {"right": "green", "wrong": "red", "open": None, "unsure": None}


@click.command(
    short_help="Mark the steps of an attempt at a problem, and give hints.",
    epilog="""\b
Examples:
  mlx-fd tutor runs/20260101-120000
  mlx-fd tutor runs/mine --problem @problem.txt --attempt @attempt.txt --json
\b
In a browser: mlx-fd serve --student runs/mine, then the address that it says.
A student of the tiny pair understands only problems as its generator writes
them (--problems arithmetic), and steps such as 47+2=49.
""",
)
@click.argument("student")
@click.option("--problem", help="The problem; @FILE reads a file, - standard input. Else it asks.")
@click.option(
    "--attempt",
    help="The attempt, one step to a line, the answer last as '#### ANSWER'; likewise.",
)
@json_option
@debug_option
def tutor(
    student: str, problem: str | None, attempt: str | None, as_json: bool, debug: bool
) -> None:
    """Mark the steps of an attempt at a problem, and give hints that leave the answer to you.

    STUDENT is a run directory (its best checkpoint), one of its checkpoints, or any model.
    """
    from mlx_fd.models.backend import backend

    given = problem is not None and attempt is not None
    if not given and (problem is not None or attempt is not None or as_json):
        raise UserError("--problem and --attempt go together; --json needs both")
    if problem == attempt == "-":
        raise UserError("--problem - and --attempt -: only one of them can be standard input")
    texts = None
    if problem is not None and attempt is not None:
        texts = text_of(problem, "--problem"), text_of(attempt, "--attempt")
    backend()
    from mlx_fd.feedback.judge import locate_model, open_student

    judge = open_student(locate_model(student))
    if texts is None:
        _sit_down(judge)
        return
    found = _look(judge, *texts)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _show(found)
    for number, hint in enumerate(found["hints"], 1):
        click.echo(f"Hint {number}: {strip_control_chars(hint)}")


def _look(judge: Judge, problem: str, text: str) -> dict[str, Any]:
    from mlx_fd.feedback.tutoring import read_attempt
    from mlx_fd.feedback.tutoring import tutor as look

    attempt = read_attempt(text)
    if not attempt.steps and not attempt.final:
        raise UserError("the attempt has neither a step nor an answer")
    return look(judge, problem, attempt)


def _sit_down(judge: Judge) -> None:
    """Problem after problem, until the learner goes."""
    while True:
        problem = _lines("Problem (an empty line ends it; at once: leave):")
        if not problem:
            return
        while True:
            attempt = _lines(
                "Your steps, one to a line, then #### and your answer (an empty line):"
            )
            if not attempt:
                break
            try:
                found = _look(judge, problem, attempt)
            except UserError as error:
                click.echo(str(error), err=True)
                continue
            _show(found)
            if found["state"] == "right" or not _help(found):
                break


def _help(found: dict[str, Any]) -> bool:
    """Give hints while they are asked for; whether the learner revises."""
    hints = list(found["hints"])
    while True:
        offered = "[h]int, " if hints else ""
        chosen = click.prompt(
            f"{offered}[r]evise, [a]ll that the student says, [n]ew problem",
            type=click.Choice(["h", "r", "a", "n"] if hints else ["r", "a", "n"]),
            show_choices=False,
        )
        if chosen == "h":
            click.echo(strip_control_chars(hints.pop(0)))
        elif chosen == "a":
            click.echo(strip_control_chars(found["feedback"]))
        else:
            return bool(chosen == "r")


def _lines(asked: str) -> str:
    click.echo(asked)
    lines: list[str] = []
    while True:
        try:
            line = input()
        except EOFError:
            return "\n".join(lines)
        if not line.strip():
            return "\n".join(lines)
        lines.append(line)


def _show(found: dict[str, Any]) -> None:
    click.secho(_STATES[found["state"]], fg=_COLOURS[found["state"]], bold=True)
    if found["score"] is not None:
        click.echo(f"How good the student finds it, from -1 to 1: {found['score']:+.2f}")
    for number, step in enumerate(found["steps"], 1):
        click.echo(f"Step {number}: {strip_control_chars(step['text'])}  ", nl=False)
        click.secho(_MARKS[step["mark"]], fg=_COLOURS[step["mark"]])
    if found["final"]["text"]:
        mark = {"right": "it fits", "wrong": "it does not fit", "open": "not checked"}
        click.echo(f"Answer: {strip_control_chars(found['final']['text'])}  ", nl=False)
        click.secho(mark[found["final"]["mark"]], fg=_COLOURS[found["final"]["mark"]])
