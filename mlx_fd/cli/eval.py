"""``mlx-fd eval``."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    SEED,
    Count,
    LateOption,
    Number,
    PathType,
    answer_kind_option,
    chat_template_option,
    chosen_model,
    code_execution_option,
    columns_option,
    debug_option,
    json_option,
    model_options,
    quiet_option,
    skip_bad_rows_option,
    thinking_options,
)
from mlx_fd.registry import SYSTEMS


def _baselines() -> str:
    return ", ".join(name for name, system in SYSTEMS.items() if system.is_baseline)


@click.command(
    "eval",
    short_help="Evaluate a student on held-out problems.",
    epilog="""\b
Examples:
  mlx-fd eval runs/20260101-120000
  mlx-fd eval runs/20260101-120000 --baselines
  mlx-fd eval runs/20260101-120000 --suite full --baselines --limit 200 \\
      --instructions alpaca.json --processbench gsm8k.json \\
      --transfer owner/name
  mlx-fd eval runs/self-distilled --temperature 1
  mlx-fd eval qwen2.5-1.5b-4bit --k 8 --limit 50
  mlx-fd eval runs/20260101-120000 --best-of 8 --forgetting
  mlx-fd eval runs/20260101-120000 --suite full \\
      --processbench gsm8k.json --votes 8
  mlx-fd eval qwen2.5-1.5b-4bit --expert qwen2.5-7b-4bit --baselines
""",
)
@model_options("model")
@click.option(
    "--suite",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: 100 problems of the test split. full: the whole split, out-of-domain "
    "arithmetic, and --instructions, --processbench and --transfer.",
)
@click.option(
    "--baselines",
    is_flag=True,
    cls=LateOption,
    late_help=lambda: f"Also evaluate the baselines: {_baselines()}.",
)
@click.option(
    "--expert",
    metavar="NAME",
    help="Expert of the baselines. [default: the run's; none for a model or a run of mlx-fd "
    "self-distill]",
)
@click.option(
    "--limit",
    type=Count(),
    metavar="N",
    help="Use only the first N items of each set. [default: 100 in fast, all in full]",
)
@click.option(
    "--k",
    "samples",
    type=Count(1, 256),
    default=1,
    show_default=True,
    help="Samples per problem, for Avg@k, Maj@k and Pass@k.",
)
@click.option(
    "--best-of",
    type=Count(2, 256),
    metavar="N",
    help="Also draw N answers to each problem, pick one by the student's scores, and compare with "
    "the majority (Maj@N), a random pick and Pass@N.",
)
@click.option(
    "--answers-by",
    type=click.Choice(("expert", "student")),
    help="Model that writes the first answers, and those of --best-of. [default: as in the run]",
)
@click.option(
    "--shots",
    type=Count(0, 64),
    default=0,
    show_default=True,
    metavar="N",
    help="Solved problems of the train split before each question.",
)
@click.option(
    "--forgetting",
    is_flag=True,
    help="Also check whether the student follows other instructions as well as before its run.",
)
@click.option(
    "--temperature",
    "--temp",
    "temperature",
    type=Number(0),
    help="Sampling temperature of the first and the direct answers. [default: the run's for first "
    "answers, 0 for direct ones; 0.7 instead of 0 with --k]",
)
@click.option(
    "--max-tokens",
    type=Count(),
    help="Maximum tokens per answer and reply. [default: the run's max_answer_tokens; 2048 for "
    "ProcessBench, half of a shorter context]",
)
@click.option(
    "--problems",
    metavar="SOURCE",
    help="Problems, as for mlx-fd loop. [default: those the run learned from, if their source has "
    "a name; arithmetic for the tiny models; else gsm8k]",
)
@click.option("--split", default="test", show_default=True, metavar="NAME", help="Dataset split.")
@click.option("--transfer", metavar="SOURCE", help="full: a second dataset, not used in training.")
@click.option(
    "--instructions",
    type=PathType(),
    metavar="FILE",
    help="full: a JSON file in Alpaca format (instruction, input, output).",
)
@click.option(
    "--processbench", type=PathType(), metavar="FILE", help="full: a file in ProcessBench format."
)
@click.option(
    "--votes",
    type=Count(1, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Replies to each ProcessBench item, whose majority counts; 1: one greedy reply.",
)
@click.option(
    "--encoder",
    metavar="NAME",
    help="BERT model for BERTScore and cosine similarity: all-minilm-l6-v2, a hub name or a "
    "directory.",
)
@click.option(
    "--toxicity",
    metavar="NAME",
    help="BERT toxicity classifier: a hub name or a directory; words: the small model of the extra "
    'toxicity (pip install "mlx-fd[toxicity]").',
)
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Output directory. [default: RUN/eval/SUITE; eval/NAME/SUITE for a model; SUITE-2 and so "
    "on if that has another evaluation]",
)
@click.option(
    "--cache",
    type=PathType(),
    metavar="DIR",
    help="Cache of generated outputs, shared by all evaluations. [default: eval in mlx-fd's cache]",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed.")
@columns_option
@answer_kind_option
@code_execution_option
@skip_bad_rows_option
@chat_template_option
@thinking_options
@click.option(
    "--expert-thinking",
    type=click.Choice(("off", "on")),
    help="Whether the expert thinks. [default: as in the run; off with --expert]",
)
@json_option
@quiet_option
@debug_option
def evaluate(
    model: str | None,
    model_option: str | None,
    adapter_path: Path | None,
    suite: str,
    baselines: bool,
    expert: str | None,
    limit: int | None,
    samples: int,
    best_of: int | None,
    answers_by: str | None,
    shots: int,
    forgetting: bool,
    temperature: float | None,
    max_tokens: int | None,
    problems: str | None,
    split: str,
    transfer: str | None,
    instructions: Path | None,
    processbench: Path | None,
    votes: int,
    encoder: str | None,
    toxicity: str | None,
    out: Path | None,
    cache: Path | None,
    seed: int,
    columns: str,
    answer_kind: str,
    allow_code_execution: bool,
    skip_bad_rows: bool,
    template_kwargs: dict[str, Any] | None,
    thinking: str | None,
    expert_thinking: str | None,
    max_thinking_tokens: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Evaluate a student on held-out problems, next to baselines.

    MODEL is a run directory (its best checkpoint), one of its checkpoints, an mlx-lm adapter, or
    any model. A student of `mlx-fd self-distill` is compared with its base model. All systems start
    from the same first answers, so differences are paired. Every number has its n and a 95 %
    interval. After Ctrl-C or a crash, run the same command again to continue; at most one batch is
    lost.
    """
    from mlx_fd.models.backend import backend

    name = chosen_model(model, model_option, adapter_path)
    backend()
    from rich.console import Console

    from mlx_fd.cli.terminal.evaluation import EvalDisplay, print_results
    from mlx_fd.cli.terminal.layout import output_console, warning
    from mlx_fd.evaluation import folders, running, suites
    from mlx_fd.evaluation.cache import Cache
    from mlx_fd.evaluation.held_out import concerns
    from mlx_fd.evaluation.target import check_thinking, open_target
    from mlx_fd.models.fingerprint import time_note
    from mlx_fd.models.storage import cache_dir
    from mlx_fd.problems import execution
    from mlx_fd.runs.marks import EVALUATION, check_free, claimed

    if out is not None:
        check_free(out, EVALUATION)
    options = suites.Options(
        suite=suite,
        baselines=baselines,
        limit=limit,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        problems=problems,
        split=split,
        transfer=transfer,
        instructions=instructions,
        processbench=processbench,
        encoder=encoder,
        toxicity=toxicity,
        seed=seed,
        columns=columns,
        answer_kind=answer_kind,
        skip_bad_rows=skip_bad_rows,
        best_of=best_of or 0,
        votes=votes,
        shots=shots,
        forgetting=forgetting,
        answers_by=answers_by,
        thinking=thinking,
        expert_thinking=expert_thinking,
        max_thinking_tokens=max_thinking_tokens,
    )
    if allow_code_execution:
        execution.allow()
    suites.check_problems(options)
    target = open_target(name, expert, adapter_path, options.changes, template_kwargs)
    check_thinking(target, options.changes)
    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    if (note := time_note()) and not quiet:
        Console(stderr=True).print(note, soft_wrap=True)

    def warn(text: str) -> None:
        console.print(warning(text), soft_wrap=True)

    sets = suites.make_sets(target, options, warn)
    folder = folders.choose_folder(target, options, out)
    for text in concerns(target, options.problems, options.split, options.transfer):
        warn(text)
    total = sum(len(one.items) * one.samples * len(one.systems) for one in sets)
    with claimed(folder, EVALUATION), EvalDisplay(console, total, quiet=quiet) as display:
        generated = Cache(cache or cache_dir() / "eval", warn)
        bench = running.make_bench(target, options, generated, display.step)
        try:
            results = running.evaluate(bench, sets, options, folder, display)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to continue", err=True)
            raise SystemExit(128 + signal.SIGINT) from None
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **results}, indent=2))
        return
    print_results(results, [one.shown for one in sets], output_console())
    click.echo(f"results: {folder}")
