"""``mlx-fd advantage``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_fd.cli.options import (
    SEED,
    Count,
    LateOption,
    Number,
    PathType,
    Words,
    debug_option,
    json_option,
    quiet_option,
    skip_bad_rows_option,
)
from mlx_fd.errors import UserError
from mlx_fd.registry import CONTEXTS

if TYPE_CHECKING:
    from mlx_fd.evaluation.statistics import Estimate
    from mlx_fd.training.selfdistill.advantage import Summary

DEFAULT = ("reference", "step-critique", "feedback", "rubric", "demonstration", "sibling",
           "reflection", "contrast")  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  mlx-fd advantage tiny-base                     where each context puts its mass
  mlx-fd advantage runs/20260101-120000 --contexts reference,step-critique
  mlx-fd advantage tiny-base --critic tiny --json
  mlx-fd advantage tiny-base --contexts clean --noise typed --noise-level 0.3
""",
)
@click.argument("target")
@click.option(
    "--contexts",
    type=Words(numbers=False),
    default=",".join(DEFAULT),
    show_default=True,
    cls=LateOption,
    late_help=lambda: f"What the self-teacher sees, of {', '.join(CONTEXTS)}.",
)
@click.option(
    "--problems",
    default="arithmetic",
    show_default=True,
    help="Problems of a source that knows the truth about any answer.",
)
@click.option("--split", default="validation", show_default=True, help="Split of the problems.")
@click.option("--limit", type=Count(), default=40, show_default=True, help="Problems to take.")
@click.option(
    "--samples", type=Count(), default=4, show_default=True, help="Attempts at each problem."
)
@click.option(
    "--temperature",
    type=Number(0.01),
    default=1.0,
    show_default=True,
    help="Of the attempts and of both distributions.",
)
@click.option(
    "--max-answer-tokens",
    type=Count(),
    default=128,
    show_default=True,
    help="Most tokens of an attempt.",
)
@click.option(
    "--critic",
    default="truth",
    show_default=True,
    help="Who writes critiques, feedback and reflections: a model, or truth, the generator's own.",
)
@click.option(
    "--critic-sees",
    type=click.Choice(["reference", "problem"]),
    default="problem",
    show_default=True,
    help="What a critic mends an attempt with; problem: in the loop's roles, as tiny knows them.",
)
@click.option(
    "--reference-style",
    type=click.Choice(["prose", "solution"]),
    default="prose",
    show_default=True,
    help="Reference solutions in sentences, as another author writes them, or as attempts are.",
)
@click.option(
    "--noise",
    type=click.Choice(["none", "typed", "transcribed"]),
    default="none",
    show_default=True,
    help="Noise on the questions.",
)
@click.option(
    "--noise-level",
    type=Number(0, 1),
    default=0.3,
    show_default=True,
    help="Share of the words hit.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the draws.")
@skip_bad_rows_option
@click.option(
    "--out",
    type=PathType(),
    help="Folder of advantage.html and advantage.json [default: RUN/advantage, or advantage]",
)
@json_option
@quiet_option
@debug_option
def advantage(
    target: str,
    contexts: list[str],
    problems: str,
    split: str,
    limit: int,
    samples: int,
    temperature: float,
    max_answer_tokens: int,
    critic: str,
    critic_sees: str,
    reference_style: str,
    noise: str,
    noise_level: float,
    seed: int,
    skip_bad_rows: bool,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Show where each context puts its mass on a model's own attempts.

    TARGET is a run directory (its best checkpoint), one of its checkpoints, or any model. It tries
    generated problems; each context's advantage at each token is split into tokens before, in and
    after the first wrong step. A page shows attempts with their tokens coloured.
    """
    from mlx_fd.models.backend import backend

    backend()
    from rich.console import Console

    from mlx_fd import problems as sources
    from mlx_fd.cli.terminal.run import Steps
    from mlx_fd.config import Config, override
    from mlx_fd.feedback.judge import locate_model, open_student
    from mlx_fd.files import check_way, write_atomic, write_json
    from mlx_fd.models.context import fitting
    from mlx_fd.models.loading import load
    from mlx_fd.models.resolve import resolve
    from mlx_fd.report.advantage_page import page
    from mlx_fd.runs import failed_write, is_run, read_manifest
    from mlx_fd.runs.marks import ADVANTAGE, check_free, claimed
    from mlx_fd.training.selfdistill import advantage as analysis
    from mlx_fd.training.selfdistill.contexts import Materials, describe

    folder = out or Path("advantage")
    run = Path(target).expanduser()
    if out is None and is_run(run):
        read_manifest(run)
        folder = check_way(run, "advantage")
    check_free(folder, ADVANTAGE)
    for name in contexts:
        describe(name)
    found = sources.load(problems, split, skip_bad_rows=skip_bad_rows)
    analysis.check_known(found.problems[:limit])
    place = locate_model(target)
    is_truth = critic == "truth"
    materials = Materials(
        critic=None if is_truth else load(resolve(critic)),
        truth=is_truth,
        critic_sees=critic_sees,
        critic_tokens=max_answer_tokens,
        reference_style=reference_style,
        seed=seed,
    )
    config = override(
        Config(),
        {
            "num_generations": samples,
            "temperature": temperature,
            "max_answer_tokens": max_answer_tokens,
            "noise": noise,
            "noise_level": noise_level,
            "seed": seed,
        },
        "command line",
    )
    fits, notes = fitting(
        found if skip_bad_rows else replace(found, problems=found.problems[:limit]),
        [place.model],
        config,
        skip=skip_bad_rows,
        with_solutions=True,
    )
    taken = fits.problems[:limit]
    unread = f"{found.skipped} rows of {found.name} could not be read and are left out"
    for text in [*([unread] if found.skipped else []), *notes]:
        click.echo(f"warning: {text}", err=True)
    loaded, _ = open_student(place)
    with Steps(Console(stderr=True), quiet=quiet) as progress:
        attempts = analysis.attempts_of(loaded, taken, config, progress)
        scored = analysis.score(
            loaded, attempts, contexts, materials, progress, temperature=temperature
        )
    rows = [analysis.summarise(scored, name) for name in contexts]
    report = {
        "target": target,
        "problems": f"{problems}/{split}",
        "critic": critic,
        "temperature": temperature,
        "noise": None if noise == "none" else [noise, noise_level],
        "seed": seed,
        "attempts": len(attempts),
        "right": sum(attempt.correct for attempt in attempts),
        "contexts": [row.to_json() for row in rows],
    }
    try:
        with claimed(folder, ADVANTAGE):
            write_json(folder / "advantage.json", report)
            write_atomic(folder / "advantage.html", page(target, rows, scored))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({failed_write(error)}); choose another --out"
        ) from error
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for line in _lines(rows):
        click.echo(line)
    click.echo(f"the page is {folder / 'advantage.html'}")


def _lines(rows: list[Summary]) -> list[str]:
    """The table as text."""
    head = ("context", "attempts", "wrong", "right", "before", "in", "after", "mass in", "against")
    body = [
        (
            row.context,
            str(row.attempts or "no attempt"),
            str(row.wrong),
            *(_number(row.mean[part], "+.2f") for part in ("right", "before", "in", "after")),
            f"{_number(row.mass_in, '.0%')} of {_number(row.tokens_in, '.0%')}",
            _number(row.negative, ".0%"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if not k else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    ]
    silent = ", ".join(row.context for row in rows if not row.attempts)
    return [
        *table,
        *(
            [f"no attempt: nothing to read about any of these: {silent} (more --samples?)"]
            if silent
            else []
        ),
        "right, before, in, after: mean advantage of tokens of right attempts, and before, in and "
        "after a first wrong step",
        "mass in: the first wrong step's share of the mass, and of the tokens; against: share of "
        "right tokens with a negative advantage",
    ]


def _number(found: Estimate, form: str) -> str:
    return "n/a" if math.isnan(found.value) else format(found.value, form)
