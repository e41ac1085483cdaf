"""``mlx-fd export`` and ``mlx-fd compare``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_fd.cli.options import (
    Count,
    LateOption,
    NameOf,
    PathType,
    debug_option,
    json_option,
    quiet_option,
)
from mlx_fd.registry import FORMATS
from mlx_fd.text import strip_control_chars


@click.command(
    epilog="""\b
Examples:
  mlx-fd export runs/mine --out student                          for mlx-lm, in its base's type
  mlx-fd export runs/mine --q-bits 8 --out student-8bit
  mlx-fd export runs/mine --format hf --out student-hf           for transformers, vLLM, SGLang
  mlx-fd export runs/mine --format gguf --out student-gguf       for llama.cpp
  mlx-fd export runs/mine --format gguf --gguf-type q8_0 --out student-q8 --archive
  mlx-fd export runs/mine --format hf --adapter --out adapter    for PEFT
  mlx-fd export runs/mine/checkpoints/000100 --adapter --out adapter
""",
)
@click.argument("source")
@click.option(
    "--format",
    "form",
    type=NameOf(FORMATS),
    default="mlx",
    show_default=True,
    cls=LateOption,
    late_help=lambda: f"{FORMATS.described()}.",
)
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    required=True,
    help="The directory to make.",
)
@click.option(
    "--adapter/--fuse",
    default=False,
    help="Write the adapter alone (mlx: as mlx-lm does; hf: as PEFT does), or the whole model with "
    "the adapter fused into it. [default: fuse]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type of the weights. [default: mlx: the base's own; hf: bfloat16]",
)
@click.option(
    "--q-bits",
    type=click.Choice(["4", "8"]),
    help="mlx: quantise to so many bits. Refused where that would lose what was learned. "
    "[default: leave the weights dequantised]",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["32", "64", "128"]),
    help="Weights that share a scale. [default: 64]",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"]),
    help="Type of the matrices in a GGUF file. With a quantised one, matrices that the training "
    "left alone keep their quantised numbers where they fit exactly. [default: f16]",
)
@click.option(
    "--base-model",
    metavar="NAME",
    help="hf --adapter: what the adapter calls its base model. [default: as it was trained]",
)
@click.option(
    "--parity-problems",
    type=Count(1, 1000),
    default=8,
    show_default=True,
    help="Problems in the parity bundle, which mlx-fd compare reads.",
)
@click.option("--parity/--no-parity", default=True, help="Write the parity bundle or leave it out.")
@click.option("--archive", is_flag=True, help="Write DIR.tar too.")
@json_option
@quiet_option
@debug_option
def export(
    source: str,
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
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write a student, or any model, for the tool that shall run it.

    SOURCE is a run directory (its best checkpoint), one of its checkpoints, or a model. What was
    written is read back and its logits are compared with the live student's before the directory
    appears. It holds a model card, the score head and, for `mlx-fd compare`, a parity bundle.
    """
    from mlx_fd.models.backend import backend

    backend()
    from rich.console import Console

    from mlx_fd.cli.terminal.run import Steps
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
    )
    with Steps(Console(stderr=True), quiet=quiet) as steps:
        done = write(source, out, wanted, with_archive=archive, progress=steps)
    for text in done.warnings:
        click.echo(f"warning: {strip_control_chars(text)}", err=True)
    if as_json:
        click.echo(json.dumps(as_json_value(done), indent=2))
        return
    found = done.agreement
    click.echo(
        f"read back and compared on {found.positions} tokens: largest difference of two logits "
        f"{found.largest_difference:.3g}, mean KL {found.mean_kl:.3g}, same likeliest token at "
        f"{found.top1:.1%}"
    )
    if done.gguf is not None and done.gguf.carried:
        matrices = sum(done.gguf.kinds.values())
        click.echo(f"{done.gguf.carried} of {matrices} matrices carried over without rounding")
    click.echo(f"{sum(done.files.values()) / 1e6:.1f} MB in {len(done.files)} files are in {out}")
