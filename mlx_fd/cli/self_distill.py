"""``mlx-fd self-distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    ConfiguredCommand,
    PathType,
    click_option,
    debug_option,
    json_option,
    quiet_option,
    shown_default,
    track_option,
)
from mlx_fd.cli.run_command import begin
from mlx_fd.config import OPTIONS, Config, read
from mlx_fd.errors import UserError
from mlx_fd.runs.tracking import check_installed
from mlx_fd.training.selfdistill.methods import CUSTOM, DEFAULT_MODEL, METHODS, PRESETS, configured

# Options of the loop that have a meaning here, beside all of the method's.
_SHARED = (
    *("student", "lora_rank", "lora_scale", "lora_layers", "dequantize"),
    *("problems", "split", "train_on_test", "episodes", "skip_bad_rows"),
    *("batch_size", "max_answer_tokens", "max_feedback_tokens", "answer_filter"),
    *("gate", "ema_decay", "stop_threshold", "plateau_steps", "plateau_gain", "minimum_gain"),
    *("lora_rate", "weight_decay", "max_grad_norm", "kd_steps", "micro_batch", "grad_checkpoint"),
    *("probe_size", "probe_every", "checkpoint_every", "keep_checkpoints", "seed"),
)


# What options of the loop are here.
_HELP = {
    "student": "The model that learns: an alias, a hub name or an mlx-lm directory; NAME:layers=K "
    "keeps K of its layers.",
    "batch_size": "Problems that are attempted before each update.",
    "max_answer_tokens": "Most tokens of an attempt.",
    "max_feedback_tokens": "Most tokens that the critic writes on an attempt.",
    "gate": "Which gate decides when the run ends; published is the loop's alone.",
    "stop_threshold": "End once the share of held-out problems that are answered wrong has fallen "
    "by this share.",
    "plateau_steps": "Looks at the held-out problems over which that share must still fall.",
    "plateau_gain": "Smallest fall over them, as a share of what it was at the start.",
    "kd_steps": "Optimiser steps on each batch.",
    "probe_size": "Held-out problems, for the headroom check and the gate.",
    "probe_every": "Batches between two looks at the held-out problems.",
    "lora_rate": "Learning rate.",
}


def _with_options(command: click.Command) -> click.Command:
    """Give the command the options that a run of self-distillation has."""
    by_method = {name for changes in (*METHODS.values(), *PRESETS.values()) for name in changes}
    for name, option in OPTIONS.items():
        flag, default = "", _default(name)
        if name == "student":
            flag, default = "--model", DEFAULT_MODEL
        elif name in by_method:
            default = "the method's"
        if name in _SHARED or (option.section == "selfdistill" and name != "method"):
            help = _HELP.get(name, "")
            command.params.append(click_option(option, flag=flag, default=default, help=help))
    return command


def _default(name: str) -> str:
    return shown_default(getattr(getattr(configured(), OPTIONS[name].section), name))


@_with_options
@click.command(
    "self-distill",
    cls=ConfiguredCommand,
    epilog="""\b
Examples:
  mlx-fd self-distill --method step-critique --critic truth         tiny-base, minutes
  mlx-fd self-distill --method step-critique --critic tiny
  mlx-fd self-distill --method grpo --episodes 64 --seed 1 --out runs/grpo
  mlx-fd self-distill --context feedback --objective jsd --critic truth
  mlx-fd self-distill --method grpo --track tensorboard
  mlx-fd self-distill --method step-critique --model qwen2.5-1.5b-4bit --critic qwen2.5-7b-4bit
  mlx-fd self-distill --config runs/grpo/config.toml --seed 2 --out runs/grpo2
""",
)
@click.option("--method", metavar="NAME", help=f"A published method: {', '.join(METHODS)}.")
@click.option(
    "--preset",
    "preset_name",
    metavar="NAME",
    help=f"Sizes for a kind of model, over the method's: {', '.join(PRESETS)}. The models "
    "whose names begin with tiny bring theirs.",
)
@click.option(
    "--config",
    "config_file",
    type=PathType(),
    metavar="FILE",
    help="A TOML file with options: an earlier run's config.toml.",
)
@click.option(
    "--out", type=PathType(), metavar="DIR", help="The run directory. [default: runs/DATE-TIME]"
)
@track_option
@json_option
@quiet_option
@debug_option
def self_distill(
    method: str | None,
    preset_name: str | None,
    config_file: Path | None,
    out: Path | None,
    trackers: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Let a model learn from itself reading more than the problem.

    The model attempts problems. Then, as its own teacher, it reads each attempt once more after a
    context: a reference solution, a critique, feedback, another attempt. What it would have written
    there it learns to write without. --method names a published combination of context and
    objective in full; any two can be put together with --context and --objective.

    Exits as `mlx-fd loop` does; `mlx-fd resume` goes on with a run.
    """
    check_installed(trackers)
    changes = {name: value for name, value in given.items() if value is not None}
    config = _configuration(method, preset_name, config_file, changes)
    begin(out, config, trackers, as_json, quiet)


def _configuration(
    method: str | None, preset_name: str | None, file: Path | None, changes: dict[str, Any]
) -> Config:
    if file is not None:
        if method or preset_name:
            raise UserError("--config says which method it is; leave --method and --preset out.")
        config = configured(given=changes, over=read(file))
        if not config.self_distils:
            raise UserError(f"{file}: is no self-distillation: it has no method.")
        return config
    if method is None and not {"context", "objective"} & changes.keys():
        raise UserError(
            f"say what to do: --method with one of {', '.join(METHODS)}; or --context and "
            "--objective."
        )
    return configured(method or CUSTOM, changes, preset=preset_name)
