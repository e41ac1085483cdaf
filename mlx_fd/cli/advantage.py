"""``mlx-fd advantage``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_fd.cli.options import (
    SEED,
    Count,
    LateOption,
    NameList,
    Number,
    PathType,
    debug_option,
    given_on_command_line,
    json_option,
    quiet_option,
    skip_bad_rows_option,
)
from mlx_fd.errors import UserError
from mlx_fd.registry import CONTEXTS

if TYPE_CHECKING:
    from mlx_fd.config import Config

DEFAULT = ("reference", "step-critique", "feedback", "rubric", "demonstration", "sibling",
           "reflection", "contrast")  # fmt: skip
JSON, PAGE = "advantage.json", "advantage.html"


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
    help="Directory for advantage.html and advantage.json. [default: RUN/advantage, or advantage; "
    "advantage-2 and so on if that has another analysis]",
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
    from mlx_fd.cli.terminal.layout import output_console, print_whole
    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.config import Config, override
    from mlx_fd.feedback.judge import locate_model, open_student
    from mlx_fd.files import failed_write, write_atomic, write_json
    from mlx_fd.models.context import fitting
    from mlx_fd.models.loading import load
    from mlx_fd.models.resolve import resolve
    from mlx_fd.report.advantage_page import page
    from mlx_fd.runs.marks import ADVANTAGE, claimed_for_later
    from mlx_fd.training.selfdistill import advantage as analysis
    from mlx_fd.training.selfdistill.contexts import Materials, describe

    asked = {
        "target": target,
        "problems": f"{problems}/{split}",
        "skip_bad_rows": skip_bad_rows,
        "limit": limit,
        "samples": samples,
        "max_answer_tokens": max_answer_tokens,
        "temperature": temperature,
        "critic": critic,
        "critic_sees": critic_sees,
        "reference_style": reference_style,
        "noise": None if noise == "none" else [noise, noise_level],
        "seed": seed,
    }
    folder = _choose_folder(target, out, asked, contexts)
    for name in contexts:
        describe(name)
    config = override(
        Config(),
        {
            "num_generations": samples,
            "temperature": temperature,
            "max_answer_tokens": max_answer_tokens,
            "critic": critic,
            "critic_sees": critic_sees,
            "reference_style": reference_style,
            "noise": noise,
            "noise_level": noise_level,
            "seed": seed,
        },
        "command line",
    )
    _check_used(config, contexts)
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
    with claimed_for_later(folder, ADVANTAGE):
        loaded = open_student(place).student_lm
        with Steps(Console(stderr=True), quiet=quiet) as progress:
            attempts = analysis.attempts_of(loaded, taken, config, progress)
            scored = analysis.score(
                loaded, attempts, contexts, materials, progress, temperature=temperature
            )
        rows = [analysis.summarise(scored, name) for name in contexts]
        report = {
            **asked,
            "attempts": len(attempts),
            "right": sum(bool(attempt.correct) for attempt in attempts),
            "contexts": [row.to_json() for row in rows],
        }
        # First the result, which files that cannot be written must not cost.
        if as_json:
            click.echo(json.dumps(report, indent=2))
        else:
            print_whole(output_console(), table(rows))
            for line in notes(rows):
                click.echo(line)
        try:
            write_json(folder / JSON, report)
            write_atomic(folder / PAGE, page(target, rows, scored))
        except OSError as error:
            raise UserError(
                f"{folder}: the analysis cannot be written there ({failed_write(error)}); choose "
                "another --out"
            ) from error
    if not as_json:
        click.echo(f"wrote {folder / PAGE}")


def _choose_folder(
    target: str, out: Path | None, asked: Mapping[str, Any], contexts: list[str]
) -> Path:
    """Where the analysis goes: never over another one.

    Raises:
        UserError: there is another one in ``out``, or something that is no analysis of ours.
    """
    from mlx_fd.files import check_way
    from mlx_fd.runs import is_run, read_manifest

    if out is not None:
        if not _is_free(out, asked, contexts):
            raise UserError(
                f"{out / JSON}: there is another analysis, and it was left alone; choose another "
                "--out"
            )
        return out
    run = Path(target).expanduser()
    within = is_run(run)
    if within:
        read_manifest(run)
    numbered = (f"advantage-{number}" for number in itertools.count(2))
    names = itertools.chain(["advantage"], numbered)
    folders = (check_way(run, name) if within else Path(name) for name in names)
    return next(folder for folder in folders if _is_free(folder, asked, contexts))


def _is_free(folder: Path, asked: Mapping[str, Any], contexts: list[str]) -> bool:
    """Whether a folder has no analysis yet, or that of the same options.

    Raises:
        UserError: there is something in it that is no analysis of ours.
    """
    from mlx_fd.files import read_text
    from mlx_fd.runs.marks import ADVANTAGE, check_free

    check_free(folder, ADVANTAGE)
    file = folder / JSON
    # A link is nobody's result: it is replaced, and what it leads to is left alone.
    if file.is_symlink() or not file.exists():
        return True
    try:
        saved = json.loads(read_text(file))
        names = [row["context"] for row in saved["contexts"]]
        return names == contexts and all(saved[name] == value for name, value in asked.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return False  # an older one, or one that was changed


def _check_used(config: Config, contexts: list[str]) -> None:
    """Refuse what was given and has no effect on any of the contexts.

    Raises:
        UserError: it has none; the message says what it needs.
    """
    from mlx_fd.config import override
    from mlx_fd.runs.unused import check_used_in_any

    options = ("critic", "critic_sees", "reference_style", "noise_level")
    given = {name: getattr(config.selfdistill, name) for name in given_on_command_line(options)}
    configs = [override(config, {"context": name}, "command line") for name in contexts]
    check_used_in_any(configs, given, "command line")
    if "clean" in contexts and config.selfdistill.noise == "none":
        raise UserError(
            "--contexts: clean is the question without its noise, and there is none: add --noise, "
            "or leave clean out"
        )
