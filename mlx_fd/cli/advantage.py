"""``mlx-fd advantage``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from mlx_fd.cli.options import (
    SEED,
    Count,
    LateOption,
    NameList,
    Number,
    PathType,
    debug_option,
    json_option,
    quiet_option,
    skip_bad_rows_option,
)
from mlx_fd.errors import UserError
from mlx_fd.registry import CONTEXTS

DEFAULT = ("reference", "step-critique", "feedback", "rubric", "demonstration", "sibling",
           "reflection", "contrast")  # fmt: skip


@click.command(
    short_help="Show per-token advantages of each self-teacher context.",
    epilog="""\b
Examples:
  mlx-fd advantage tiny-base
  mlx-fd advantage runs/20260101-120000 --contexts reference,step-critique
  mlx-fd advantage tiny-base --critic tiny --json
  mlx-fd advantage tiny-base --contexts clean --noise typed --noise-level 0.3
""",
)
@click.argument("target")
@click.option(
    "--contexts",
    type=NameList(CONTEXTS),
    default=",".join(DEFAULT),
    cls=LateOption,
    late_help=lambda: (
        f"Contexts of the self-teacher. One of: {', '.join(CONTEXTS)}. [default: all "
        "but none and clean]"
    ),
)
@click.option(
    "--problems",
    default="arithmetic",
    show_default=True,
    help="Problem source that knows the truth about any answer.",
)
@click.option("--split", default="validation", show_default=True, help="Split of the problems.")
@click.option("--limit", type=Count(), default=40, show_default=True, help="Number of problems.")
@click.option("--samples", type=Count(), default=4, show_default=True, help="Attempts per problem.")
@click.option(
    "--temperature",
    type=Number(0.01),
    default=1.0,
    show_default=True,
    help="Sampling temperature, also of both distributions.",
)
@click.option(
    "--max-answer-tokens",
    type=Count(),
    default=128,
    show_default=True,
    help="Maximum tokens per attempt.",
)
@click.option(
    "--critic",
    default="truth",
    show_default=True,
    help="Model that writes critiques, feedback and reflections, or truth: the generator's own.",
)
@click.option(
    "--critic-sees",
    type=click.Choice(["reference", "problem"]),
    default="problem",
    show_default=True,
    help="What the critic corrects an attempt with; problem: alone, in the loop's roles.",
)
@click.option(
    "--reference-style",
    type=click.Choice(["prose", "solution"]),
    default="prose",
    show_default=True,
    help="Style of the reference solutions: prose, that of another author, or the attempts'.",
)
@click.option(
    "--noise",
    type=click.Choice(["none", "typed", "transcribed"]),
    default="none",
    show_default=True,
    help="Noise added to the questions.",
)
@click.option(
    "--noise-level",
    type=Number(0, 1),
    default=0.3,
    show_default=True,
    help="Fraction of the words with noise.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@skip_bad_rows_option
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Directory for advantage.html and advantage.json. [default: RUN/advantage, or advantage]",
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
    """Show per-token advantages of each self-teacher context.

    TARGET is a run directory (its best checkpoint), one of its checkpoints, or any model. It
    attempts generated problems; each context's advantages are averaged over the tokens before, in
    and after the first wrong step. An HTML page shows the attempts, their tokens coloured by
    advantage.
    """
    from mlx_fd.models.backend import backend

    backend()
    from rich.console import Console

    from mlx_fd import problems as sources
    from mlx_fd.cli.terminal.advantage import notes, table
    from mlx_fd.cli.terminal.layout import output_console
    from mlx_fd.cli.terminal.steps import Steps
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
    fits, left_out = fitting(
        found if skip_bad_rows else replace(found, problems=found.problems[:limit]),
        [place.model],
        config,
        skip=skip_bad_rows,
        with_solutions=True,
    )
    taken = fits.problems[:limit]
    for text in (*found.notes, *left_out):
        click.echo(f"warning: {text}", err=True)
    loaded = open_student(place).student_lm
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
        "right": sum(bool(attempt.correct) for attempt in attempts),
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
    output_console().print(table(rows))
    for line in notes(rows):
        click.echo(line)
    click.echo(f"wrote {folder / 'advantage.html'}")
