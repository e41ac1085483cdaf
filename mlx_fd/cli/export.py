"""``mlx-fd export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    Choice,
    Count,
    LateOption,
    PathType,
    chat_template_option,
    chosen_model,
    debug_option,
    json_option,
    model_options,
    quiet_option,
)
from mlx_fd.registry import FORMATS
from mlx_fd.text import strip_control_chars


@click.command(
    short_help="Export a student, or any model, for other tools.",
    epilog="""\b
Examples:
  mlx-fd export runs/mine --out student                       for mlx-lm
  mlx-fd export runs/mine --q-bits 8 --out student-8bit
  mlx-fd export runs/mine --format hf --out student-hf        for vLLM, ...
  mlx-fd export runs/mine --format gguf --out student-gguf    for llama.cpp
  mlx-fd export runs/mine --format gguf --gguf-type q8_0 --out q8 --archive
  mlx-fd export runs/mine --format hf --adapter --out peft    for PEFT
  mlx-fd export runs/mine/checkpoints/000100 --adapter --out adapter
  mlx-fd export --model NAME --adapter-path adapters --out fused
""",
)
@model_options("source")
@click.option(
    "--format",
    "form",
    type=Choice(FORMATS),
    default="mlx",
    show_default=True,
    cls=LateOption,
    late_help=lambda: f"Output format. {FORMATS.described()}.",
)
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    required=True,
    help="Directory to create.",
)
@click.option(
    "--adapter/--fuse",
    default=False,
    help="Write only the adapter (mlx: mlx-lm's format; hf: PEFT's), or the whole model with the "
    "adapter fused into it. [default: fuse]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Data type of the weights. [default: mlx: the base's; hf: bfloat16]",
)
@click.option(
    "--q-bits",
    type=click.Choice(["4", "8"]),
    help="mlx: quantise to this many bits. Refused if quantisation would undo the training. "
    "[default: not quantised]",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Quantisation group size. [default: 64]",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "mxfp4", "q4_1", "q4_0"]),
    help="gguf: data type of the weight matrices. With a quantised type, matrices not changed by "
    "the training keep the base's quantised values if those fit exactly; mxfp4 is for a base "
    "in MXFP4 (gpt-oss), whose other matrices become q8_0. [default: f16]",
)
@click.option(
    "--base-model",
    metavar="NAME",
    help="hf --adapter: name of the base model to write into the adapter. [default: the base it "
    "was trained on]",
)
@click.option(
    "--parity-problems",
    type=Count(1, 1000),
    default=8,
    show_default=True,
    help="Problems in the parity bundle for mlx-fd compare.",
)
@click.option(
    "--parity/--no-parity",
    default=True,
    help="Write the parity bundle for mlx-fd compare. [default: parity]",
)
@click.option("--archive", is_flag=True, help="Also write DIR.tar.")
@chat_template_option
@json_option
@quiet_option
@debug_option
def export(
    source: str | None,
    model_option: str | None,
    adapter_path: Path | None,
    form: str,
    out: Path,
    adapter: bool,
    dtype: str | None,
    q_bits: str | None,
    q_group_size: str | None,
    gguf_type: str | None,
    base_model: str | None,
    parity_problems: int,
    parity: bool,
    archive: bool,
    template_kwargs: dict[str, Any] | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Export a student, or any model, for other tools.

    SOURCE is a run directory (its best checkpoint), one of its checkpoints, or a model. The export
    is read back and its logits are compared with those of the model in memory before the directory
    appears. It includes a model card, the score head and a parity bundle for `mlx-fd compare`.
    """
    from mlx_fd.models.backend import backend

    name = chosen_model(source, model_option, adapter_path, "SOURCE")
    backend()
    from rich.console import Console

    from mlx_fd.cli.terminal.steps import Steps
    from mlx_fd.export.exporter import as_json_value
    from mlx_fd.export.exporter import export as write
    from mlx_fd.export.form import Form

    wanted = Form(
        format=form,
        adapter=adapter,
        dtype=dtype,
        q_bits=int(q_bits) if q_bits else None,
        q_group_size=int(q_group_size) if q_group_size else None,
        gguf_type=gguf_type,
        base_model=base_model,
        parity_problems=parity_problems if parity else 0,
        template_kwargs=template_kwargs,
    )
    with Steps(Console(stderr=True), quiet=quiet) as steps:
        done = write(name, out, wanted, adapter=adapter_path, with_archive=archive, progress=steps)
    for text in done.warnings:
        click.echo(f"warning: {strip_control_chars(text)}", err=True)
    if as_json:
        click.echo(json.dumps(as_json_value(done), indent=2))
        return
    found = done.agreement
    click.echo(
        f"read back and compared on {found.positions} tokens: maximum logit difference "
        f"{found.largest_difference:.3g}, mean KL {found.mean_kl:.3g}, same top-1 token "
        f"{found.top1:.1%}"
    )
    if done.gguf is not None and done.gguf.carried:
        matrices = sum(done.gguf.kinds.values())
        click.echo(f"{done.gguf.carried} of {matrices} matrices copied without rounding")
    click.echo(f"wrote {len(done.files)} files, {sum(done.files.values()) / 1e6:.1f} MB, to {out}")
