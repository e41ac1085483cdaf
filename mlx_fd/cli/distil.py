"""``mlx-fd distil``."""

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
from mlx_fd.config import OPTIONS, check_command, read
from mlx_fd.errors import UserError
from mlx_fd.runs.tracking import check_installed
from mlx_fd.runs.unused import check_used
from mlx_fd.training.selfdistill.methods import EXPERT_METHODS, PRESETS, configured

_OPTIONS = (
    *("expert", "student", "lora_rank", "lora_scale", "lora_layers", "dequantize"),
    *("chat_template_kwargs", "template_date"),
    *("problems", "split", "train_on_test", "episodes", "columns", "answer_kind", "skip_bad_rows"),
    "allow_code_execution",
    *("batch_size", "max_answer_tokens", "answer_filter"),
    *("student_thinking", "expert_thinking", "max_thinking_tokens"),
    *("objective", "on_policy_fraction", "expert_answers", "first_tokens", "skip_tokens"),
    *("num_generations", "generation_batch_size", "temperature", "top_p", "top_k"),
    *(
        "jsd_beta",
        "support",
        "loss_top_k",
        "teacher_cache",
        "tail",
        "token_clip",
        "stale_cap",
        "warmup_steps",
    ),
    *("gate", "ema_decay", "stop_threshold", "plateau_steps", "plateau_gain", "minimum_gain"),
    *("lora_rate", "weight_decay", "max_grad_norm", "kd_steps", "epochs"),
    *("micro_batch", "grad_checkpoint"),
    *("probe_size", "probe_every", "checkpoint_every", "keep_checkpoints", "seed"),
)
_HELP = {
    "batch_size": "Problems per update.",
    "max_answer_tokens": "Maximum tokens per answer.",
    "on_policy_fraction": "Fraction of the problems that the student answers; the expert answers "
    "the others.",
    "num_generations": "Answers per problem.",
    "generation_batch_size": "Answers to generate in parallel.",
    "objective": "forward, reverse or jsd: a divergence of the next-token distributions; sampled: "
    "the expert's log-probability of each drawn token as its advantage; likelihood: the expert's "
    "answers as texts.",
    "epochs": "Passes over the problems; the student draws new answers in each, and the expert's "
    "are kept.",
    "teacher_cache": "Directory of the expert's top k on what it wrote, with --support teacher; "
    "runs may share one. Empty: in the run directory.",
    "gate": "Gate that ends the run.",
    "kd_steps": "Optimiser steps per batch.",
    "lora_rate": "Learning rate.",
    "first_tokens": "Learn from so many first tokens of an answer only; 0: from all.",
    "stop_threshold": "End the run once the error rate on held-out problems has fallen by this "
    "fraction.",
    "plateau_steps": "Probe evaluations over which the error rate must still fall.",
    "plateau_gain": "Minimum fall over plateau_steps, as a fraction of the initial error rate.",
    "probe_size": "Held-out problems, for the headroom check and the gate.",
    "probe_every": "Batches between probe evaluations.",
}
_FLAGS: dict[str, tuple[str, ...]] = {
    "max_answer_tokens": ("--max-answer-tokens", "--max-tokens"),
    "temperature": ("--temperature", "--temp"),
}
_METHOD = "on-policy"


def _with_options(command: click.Command) -> click.Command:
    """Give the command the options that answers are distilled with."""
    changed = {
        name for changes in (*EXPERT_METHODS.values(), *PRESETS.values()) for name in changes
    }
    usual = configured(_METHOD)
    defaults = {
        name: "the method's"
        if name in changed
        else shown_default(getattr(getattr(usual, OPTIONS[name].section), name))
        for name in _OPTIONS
    }
    return add_options(command, defaults, _FLAGS, _HELP)


@_with_options
@click.command(
    cls=ConfiguredCommand,
    short_help="Distil an expert's answers into a student.",
    epilog="""\b
Examples:
  mlx-fd distil --expert qwen2.5-7b-4bit --problems gsm8k
  mlx-fd distil --expert tiny                                takes minutes
  mlx-fd distil --expert tiny --method gkd --seed 1 --out runs/gkd
  mlx-fd distil --expert tiny --method off-policy --expert-answers all
  mlx-fd distil --expert qwen3-8b-4bit --on-policy-fraction 0.5 \\
      --objective forward
  mlx-fd distil --config runs/gkd/config.toml --seed 2 --out runs/gkd2
""",
)
@click.option(
    "--method",
    type=Choice(list(EXPERT_METHODS)),
    metavar="NAME",
    help=f"What is matched on whose answers. One of: {', '.join(EXPERT_METHODS)}. "
    f"[default: {_METHOD}]",
)
@click.option(
    "--preset",
    "preset_name",
    type=Choice(list(PRESETS)),
    help="Sizes for a kind of model, overriding the method's. The experts tiny and tiny-hard imply "
    "theirs.",
)
@config_file_option
@out_option
@track_option
@json_option
@quiet_option
@debug_option
def distil(
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
    """Distil an expert's answers into a student.

    The student answers problems, and the expert reads each answer: the student is trained to have
    the expert's next-token distributions on it (on-policy). The expert may write answers too, of
    which right ones are learned from (off-policy, mixed). What the student learns is to solve;
    mlx-fd loop teaches it to judge.

    The exit status is that of `mlx-fd loop`; `mlx-fd resume` continues a stopped run.
    """
    check_installed(trackers)
    changes = {name: value for name, value in given.items() if value is not None}
    if config_file is None:
        config = configured(method or _METHOD, changes, preset=preset_name)
    else:
        if method or preset_name:
            raise UserError("--config names the method; leave --method and --preset out.")
        before = read(config_file)
        check_command(before, "distil", config_file)
        if "expert" in changes:
            changes["critic"] = changes["expert"]
        config = configured(given=changes, over=before)
    check_used(config, changes, "command line")
    begin(out, config, trackers, as_json, quiet)
