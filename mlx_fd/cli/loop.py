"""``mlx-fd loop``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    Choice,
    ConfiguredCommand,
    config_file_option,
    configuration,
    debug_option,
    json_option,
    out_option,
    quiet_option,
    track_option,
    with_configuration,
)
from mlx_fd.cli.run_command import begin
from mlx_fd.config import CONTINUOUS, OPTIONS, PRESETS, check_command
from mlx_fd.runs.tracking import check_installed


def _short(batching: str) -> Callable[[Any], Any]:
    """A flag that stands for one way of batching."""
    return click.option(
        f"--{batching}",
        "batching",
        flag_value=batching,
        type=Choice(OPTIONS["batching"].words),
        default=None,
        help=f"The same as --batching {batching}.",
    )


@with_configuration
@click.command(
    cls=ConfiguredCommand,
    short_help="Distil an expert's feedback into a student.",
    epilog="""\b
Examples:
  mlx-fd loop --expert qwen2.5-7b-4bit
  mlx-fd loop --expert llama-3.1-8b-4bit --episodes 1000 --preset 16gb
  mlx-fd loop --preset tiny
  mlx-fd loop --preset tiny --loss-weights phases \\
      --losses lm,logit,score,answer,reasoning
  mlx-fd loop --expert qwen2.5-7b-4bit --teacher-top-k 64 --epochs 3
  mlx-fd loop --expert qwen2.5-7b-4bit --warm-up distil:200
  mlx-fd loop --expert smollm2-135m --student smollm2-135m:layers=15 \\
      --preset quick
  mlx-fd loop --config runs/mine/config.toml --seed 1 --out runs/seed1
  mlx-fd loop --preset tiny --track tensorboard
  mlx-fd loop --config runs/always/pareto.toml   as mlx-fd pareto recommends
  mlx-fd loop --problems kept.jsonl --continue runs/mine
""",
)
@click.option(
    "--preset",
    "preset_name",
    type=Choice(list(PRESETS)),
    help="A set of options, which other options override.",
)
@_short("lockstep")
@_short(CONTINUOUS)
@config_file_option
@out_option
@track_option
@json_option
@quiet_option
@debug_option
def loop(
    preset_name: str | None,
    config_file: Path | None,
    out: Path | None,
    trackers: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Distil the expert's feedback into the student while the expert solves problems.

    Options on the command line override --config, which overrides --preset. Ctrl-C stops the run
    after the current batch; a second Ctrl-C stops it at once and discards that batch. With
    continuous batching "batch" means the batches up to the next checkpoint. Either way `mlx-fd
    resume` continues the run exactly where it stopped.

    Exit status: 0 when the run is complete, 2 on invalid input, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP (a closed terminal).
    """
    check_installed(trackers)
    if given.get("continue_from"):
        config_file, given = _continued(config_file, given)
    config = configuration(preset_name, config_file, given)
    check_command(config, "loop", config_file)
    begin(out, config, trackers, as_json, quiet)


def _continued(config_file: Path | None, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The configuration that a run with ``--continue`` is made from: the earlier run's."""
    from mlx_fd.config import read
    from mlx_fd.training.continuing import asked_kind, earlier_config, sizes

    earlier = config_file or earlier_config(given["continue_from"])
    config = read(earlier)
    # What an earlier run began with is learned already.
    given = {**given, "warm_up": given.get("warm_up") or ""}
    kind = given.get("answer_kind") or asked_kind(config.problems, given)
    given = {**given, "answer_kind": kind}
    if given.get("problems") is not None and config_file is None:
        # The earlier run's columns are those of its own file.
        given = {**given, "columns": given.get("columns") or ""}
        given = {**given, **sizes(given, config)}
    return earlier, given
