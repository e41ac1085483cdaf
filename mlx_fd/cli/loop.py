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
    debug_option,
    json_option,
    out_option,
    quiet_option,
    track_option,
    with_configuration,
)
from mlx_fd.cli.run_command import begin
from mlx_fd.config import OPTIONS, PRESETS
from mlx_fd.config.fields import CONTINUOUS
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
    from mlx_fd.runs.continued import loop_configuration

    config = loop_configuration(preset_name, config_file, given, "command line")
    begin(out, config, trackers, as_json, quiet)
