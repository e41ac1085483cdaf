"""``mlx-fd self-distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    Choice,
    ConfiguredCommand,
    add_options,
    config_file_option,
    debug_option,
    json_option,
    out_option,
    quiet_option,
    shown_default,
    track_option,
)
from mlx_fd.cli.run_command import begin
from mlx_fd.config import OPTIONS, Config, check_command, read
from mlx_fd.errors import UserError
from mlx_fd.runs.tracking import check_installed
from mlx_fd.runs.unused import check_used
from mlx_fd.training.selfdistill.methods import CUSTOM, DEFAULT_MODEL, METHODS, PRESETS, configured

# Options of the loop that have a meaning here, beside all of the method's.
_SHARED = (
    *("student", "lora_rank", "lora_scale", "lora_layers", "lora_keys", "dequantize"),
    *("chat_template_kwargs", "template_date"),
    *("problems", "split", "train_on_test", "episodes"),
    *("columns", "answer_kind", "allow_code_execution", "skip_bad_rows"),
    *("batch_size", "max_answer_tokens", "max_feedback_tokens", "answer_filter"),
    *("student_thinking", "expert_thinking", "max_thinking_tokens"),
    *("gate", "ema_decay", "stop_threshold", "plateau_steps", "plateau_gain", "minimum_gain"),
    *("lora_rate", "weight_decay", "max_grad_norm", "kd_steps", "micro_batch", "grad_checkpoint"),
    *("epochs", "probe_size", "probe_every", "checkpoint_every", "keep_checkpoints", "seed"),
)

# Options that mlx-lm has too are spelled its way as well.
_FLAGS: dict[str, tuple[str, ...]] = {
    "student": ("--model",),
    "max_answer_tokens": ("--max-answer-tokens", "--max-tokens"),
    "temperature": ("--temperature", "--temp"),
}
# What options of the loop mean here.
_HELP = {
    "student": "Model to train: an alias, a hub name or an mlx-lm directory; NAME:layers=K "
    "keeps K of its layers.",
    "batch_size": "Problems per update.",
    "max_answer_tokens": "Maximum tokens per attempt.",
    "max_feedback_tokens": "Maximum tokens that the critic writes per attempt.",
    "student_thinking": "Whether the student thinks before an attempt; its thought is not learned "
    "from.",
    "expert_thinking": "Whether the critic thinks before it writes.",
    "gate": "Gate that ends the run; published is for the loop only.",
    "stop_threshold": "End the run once the error rate on held-out problems has fallen by this "
    "fraction.",
    "plateau_steps": "Probe evaluations over which the error rate must still fall.",
    "plateau_gain": "Minimum fall over plateau_steps, as a fraction of the initial error rate.",
    "kd_steps": "Optimiser steps per batch.",
    "probe_size": "Held-out problems, for the headroom check and the gate.",
    "probe_every": "Batches between probe evaluations.",
    "lora_rate": "Learning rate.",
    "epochs": "Passes over the problems, each with new attempts.",
}


def _with_options(command: click.Command) -> click.Command:
    """Give the command the options that a run of self-distillation has."""
    by_method = {name for changes in (*METHODS.values(), *PRESETS.values()) for name in changes}
    defaults = {}
    for name, option in OPTIONS.items():
        if name in _SHARED or (option.section == "selfdistill" and name != "method"):
            defaults[name] = "the method's" if name in by_method else _default(name)
    defaults["student"] = DEFAULT_MODEL
    return add_options(command, defaults, _FLAGS, _HELP)


def _default(name: str) -> str:
    return shown_default(getattr(getattr(configured(), OPTIONS[name].section), name))


@_with_options
@click.command(
    "self-distill",
    cls=ConfiguredCommand,
    short_help="Train a model on its own outputs given more context.",
    epilog="""\b
Examples:
  mlx-fd self-distill --method step-critique --critic truth   takes minutes
  mlx-fd self-distill --method step-critique --critic tiny
  mlx-fd self-distill --method grpo --episodes 64 --seed 1 --out runs/grpo
  mlx-fd self-distill --context feedback --objective jsd --critic truth
  mlx-fd self-distill --method grpo --track tensorboard
  mlx-fd self-distill --method step-critique --model qwen2.5-1.5b-4bit \\
      --critic qwen2.5-7b-4bit
  mlx-fd self-distill --config runs/grpo/config.toml --seed 2 --out runs/grpo2
""",
)
@click.option(
    "--method",
    type=Choice(list(METHODS)),
    metavar="NAME",
    help=f"A published method. One of: {', '.join(METHODS)}.",
)
@click.option(
    "--preset",
    "preset_name",
    type=Choice(list(PRESETS)),
    help="Sizes for a kind of model, overriding the method's. Models in the package imply "
    "their own.",
)
@config_file_option
@out_option
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
    """Train a model on its own outputs given more context.

    The model attempts problems. Then, as its own teacher, it rereads each attempt after a context:
    a reference solution, a critique, feedback, or another attempt. It is trained to match these
    outputs without the context. --method selects a published combination of context and objective;
    --context and --objective combine any two.

    The exit status is that of `mlx-fd loop`; `mlx-fd resume` continues a stopped run.
    """
    check_installed(trackers)
    changes = {name: value for name, value in given.items() if value is not None}
    config = _configuration(method, preset_name, config_file, changes)
    check_used(config, changes, "command line")
    begin(out, config, trackers, as_json, quiet)


def _configuration(
    method: str | None, preset_name: str | None, file: Path | None, changes: dict[str, Any]
) -> Config:
    if file is not None:
        if method or preset_name:
            raise UserError("--config names the method; leave --method and --preset out.")
        before = read(file)
        check_command(before, "self-distill", file)
        return configured(given=changes, over=before)
    if method is None and not {"context", "objective"} & changes.keys():
        raise UserError(
            f"choose a method: --method with one of {', '.join(METHODS)}; or --context and "
            "--objective."
        )
    return configured(method or CUSTOM, changes, preset=preset_name)
