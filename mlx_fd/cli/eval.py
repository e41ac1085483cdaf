"""``mlx-fd eval``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from mlx_fd.cli.options import (
    SEED,
    Count,
    LateOption,
    Number,
    PathType,
    debug_option,
    json_option,
    quiet_option,
    skip_bad_rows_option,
)
from mlx_fd.registry import SYSTEMS
from mlx_fd.text import strip_control_chars


def _baselines() -> str:
    return ", ".join(name for name, system in SYSTEMS.items() if system.is_baseline)


@click.command(
    "eval",
    epilog="""\b
Examples:
  mlx-fd eval runs/20260101-120000
  mlx-fd eval runs/20260101-120000 --baselines
  mlx-fd eval runs/20260101-120000 --suite full --baselines --limit 200 \\
      --instructions alpaca.json --processbench gsm8k.json --transfer owner/name
  mlx-fd eval runs/self-distilled --temperature 1
  mlx-fd eval qwen2.5-1.5b-4bit --k 8 --limit 50
  mlx-fd eval qwen2.5-1.5b-4bit --expert qwen2.5-7b-4bit --baselines
""",
)
@click.argument("model")
@click.option(
    "--suite",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: GSM8K's test split, 100 problems. full: all of it, arithmetic out of domain, and "
    "what --instructions, --processbench and --transfer name.",
)
@click.option(
    "--baselines",
    is_flag=True,
    cls=LateOption,
    late_help=lambda: f"Compare with other ways to an answer, too: {_baselines()}.",
)
@click.option(
    "--expert",
    metavar="NAME",
    help="The expert of the baselines. [default: the run's; none for a model and for a run of "
    "mlx-fd self-distill]",
)
@click.option(
    "--limit",
    type=Count(),
    help="The first so many of each set. [default: 100 in fast, all in full]",
)
@click.option(
    "--k",
    "samples",
    type=Count(1, 256),
    default=1,
    show_default=True,
    help="Samples of each problem, for Avg@k, Maj@k and Pass@k.",
)
@click.option(
    "--temperature",
    type=Number(0),
    help="Of first answers and bare answers. [default: the run's for first answers, 0 for bare "
    "ones; with --k 0.7 in place of 0]",
)
@click.option(
    "--problems",
    metavar="SOURCE",
    help="As for mlx-fd loop. [default: what the run learned from, where that has a name; "
    "arithmetic for the tiny models; else gsm8k]",
)
@click.option("--split", default="test", show_default=True, help="Split of the problems.")
@click.option(
    "--transfer", metavar="SOURCE", help="full: a second data set, which the run never saw."
)
@click.option(
    "--instructions",
    type=PathType(),
    metavar="FILE",
    help="full: a JSON file of Alpaca's format (instruction, input, output).",
)
@click.option(
    "--processbench", type=PathType(), metavar="FILE", help="full: a file of ProcessBench's format."
)
@click.option(
    "--encoder",
    metavar="NAME",
    help="A BERT for BERTScore and cosines: all-minilm-l6-v2, a hub name or a directory.",
)
@click.option(
    "--toxicity",
    metavar="NAME",
    help="A BERT classifier of toxic texts: a hub name or a directory; words: the small model of "
    'the extra toxicity (pip install "mlx-fd[toxicity]").',
)
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Folder of the results. [default: RUN/eval/SUITE; eval/NAME/SUITE for a model; "
    "SUITE-2 and so on beside another evaluation]",
)
@click.option(
    "--cache",
    type=PathType(),
    metavar="DIR",
    help="Folder of what was generated, for all evaluations. [default: eval in mlx-fd's cache]",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all draws.")
@skip_bad_rows_option
@json_option
@quiet_option
@debug_option
def evaluate(
    model: str,
    suite: str,
    baselines: bool,
    expert: str | None,
    limit: int | None,
    samples: int,
    temperature: float | None,
    problems: str | None,
    split: str,
    transfer: str | None,
    instructions: Path | None,
    processbench: Path | None,
    encoder: str | None,
    toxicity: str | None,
    out: Path | None,
    cache: Path | None,
    seed: int,
    skip_bad_rows: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Measure a student on held-out problems, beside other ways to an answer.

    MODEL is a run directory (its best checkpoint), one of its checkpoints, an mlx-lm adapter, or
    any model. Beside the student of a run of `mlx-fd self-distill` stands the model that it was.
    All systems go on from the same first answers, so differences are paired. Every number comes
    with its n and a 95 % interval. Ctrl-C or a kill loses one batch at most: the same command goes
    on.
    """
    from mlx_fd.models.backend import backend

    backend()
    from rich.console import Console
    from rich.text import Text

    from mlx_fd.cli.terminal.evaluation import EvalDisplay, print_results
    from mlx_fd.evaluation import suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.target import open_target
    from mlx_fd.models.fingerprint import time_note
    from mlx_fd.models.storage import cache_dir
    from mlx_fd.runs.marks import EVALUATION, check_free, claimed

    if out is not None:
        check_free(out, EVALUATION)
    options = suites.Options(
        suite=suite,
        baselines=baselines,
        limit=limit,
        samples=samples,
        temperature=temperature,
        problems=problems,
        split=split,
        transfer=transfer,
        instructions=instructions,
        processbench=processbench,
        encoder=encoder,
        toxicity=toxicity,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
    )
    target = open_target(model, expert)
    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    if (note := time_note()) and not quiet:
        console.print(note, soft_wrap=True)

    def warn(text: str) -> None:
        console.print(
            Text.assemble(("warning: ", "yellow"), strip_control_chars(text)), soft_wrap=True
        )

    sets = suites.make_sets(target, options, warn)
    folder = suites.choose_folder(target, options, out)
    for text in suites.concerns(target, options):
        warn(text)
    total = sum(len(one.items) * one.samples * len(one.systems) for one in sets)
    with claimed(folder, EVALUATION), EvalDisplay(console, total, quiet=quiet) as display:
        generated = Cache(cache or cache_dir() / "eval", warn)
        bench = suites.make_bench(target, options, generated, display.step)
        try:
            results = suites.evaluate(bench, sets, options, folder, display)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on", err=True)
            raise SystemExit(128 + signal.SIGINT) from None
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **results}, indent=2))
        return
    print_results(results, [one.shown for one in sets], console)
    click.echo(f"everything is in {folder}")
