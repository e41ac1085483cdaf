"""``mlx-fd loop`` and ``mlx-fd resume``."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

import click

from mlx_fd.cli.options import (
    ConfiguredCommand,
    PathType,
    configuration,
    debug_option,
    json_option,
    quiet_option,
    with_configuration,
)
from mlx_fd.cli.stopping import Stopped, explained, stopping_on_signals
from mlx_fd.config import PRESETS, read


@with_configuration
@click.command(
    cls=ConfiguredCommand,
    epilog="""\b
Examples:
  mlx-fd loop --expert qwen2.5-7b-4bit
  mlx-fd loop --expert llama-3.1-8b-4bit --episodes 1000 --preset 16gb
  mlx-fd loop --preset tiny
  mlx-fd loop --preset tiny --losses lm,logit,score,answer,reasoning --loss-weights phases
  mlx-fd loop --expert qwen2.5-7b-4bit --teacher-top-k 64 --epochs 3
  mlx-fd loop --expert smollm2-135m --student smollm2-135m:layers=15 --preset quick
  mlx-fd loop --config runs/mine/config.toml --seed 1 --out runs/seed1
  mlx-fd loop --config runs/always/pareto.toml    stops where mlx-fd pareto recommends
""",
)
@click.option("--preset", "preset_name", metavar="NAME", help=f"One of: {', '.join(PRESETS)}.")
@click.option(
    "--config",
    "config_file",
    type=PathType(),
    metavar="FILE",
    help="A TOML file with options, for instance an earlier run's config.toml.",
)
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="The run directory. [default: runs/DATE-TIME]",
)
@json_option
@quiet_option
@debug_option
def loop(
    preset_name: str | None,
    config_file: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Distil the expert's feedback into the student while the expert solves problems.

    Options given here win over --config, which wins over --preset. Ctrl-C ends the run after the
    batch under way, twice at once; either way `mlx-fd resume` goes on exactly there.

    Exits with 0 when the run is done, with 130 after Ctrl-C (143 after SIGTERM), with 2 when
    something has to be mended first.
    """
    from mlx_fd.backend import backend

    config = configuration(preset_name, config_file, given)
    backend()
    from mlx_fd.session import check_out, make_plan

    folder = out or _new_folder()
    check_out(folder)
    _run(folder, make_plan(config), [], as_json, quiet, new=True)


def _new_folder() -> Path:
    """A run directory of this second that is not there yet."""
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    return folder


@click.command(
    epilog="""\b
Examples:
  mlx-fd resume runs/20260101-120000
""",
)
@click.argument("run", type=PathType())
@json_option
@quiet_option
@debug_option
def resume(run: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Go on with a run exactly where it stopped.

    RUN is its directory. Exits as `mlx-fd loop` does.
    """
    from mlx_fd.backend import backend

    backend()
    from mlx_fd import runs
    from mlx_fd.session import check_same, make_plan

    manifest = runs.read_manifest(run)
    with runs.locked(run):
        plan = make_plan(read(run / runs.CONFIG))
        worries = check_same(manifest, plan.manifest, run)
        with runs.explained(run):
            # A run that was made longer is compared with its new length next time.
            manifest["options"] = plan.manifest["options"]
            runs.write_json(run / runs.MANIFEST, manifest)
        _run(run, plan, worries, as_json, quiet, new=False)


def _run(
    folder: Path, plan: Any, worries: list[str], as_json: bool, quiet: bool, *, new: bool
) -> None:
    from rich.console import Console

    from mlx_fd import runs
    from mlx_fd.backend import backend
    from mlx_fd.config import to_toml
    from mlx_fd.display import Display, summary_table
    from mlx_fd.events import Note, Warned
    from mlx_fd.loop import run
    from mlx_fd.session import open_pair

    # With --json, standard output belongs to the script that reads it.
    console = Console(stderr=as_json)
    with contextlib.ExitStack() as held:
        display = held.enter_context(Display(console, quiet=quiet))
        display(Note(f"run directory: {folder}"))
        models = plan.config.models
        display(Note(f"expert {models.expert}, student {models.student}, {backend().device}"))
        for text in (*plan.notes, *worries):
            display(Warned(text))
        if backend().device == "metal":
            display(
                Note("a sleeping Mac stops the run: `caffeinate -is mlx-fd ...` keeps it awake")
            )
        pair = open_pair(plan)
        if new:
            # Only now: models that cannot be loaded leave no run behind.
            held.enter_context(runs.locked(folder))
            with runs.explained(folder):
                runs.create(folder, to_toml(plan.config), plan.manifest)
        stopped = held.enter_context(stopping_on_signals(lambda text: display(Note(text))))
        try:
            summary = run(
                folder,
                plan.config,
                pair,
                plan.probe,
                plan.problems,
                display,
                lambda: bool(stopped),
                plan.exam(),
            )
        except RuntimeError as error:
            raise explained(error, folder) from error
        except KeyboardInterrupt:
            raise Stopped(folder, "stopped at once", stopped) from None
    if as_json:
        result = {"run": str(folder), "done": summary is not None, **(summary or {})}
        click.echo(json.dumps(result, indent=2))
    if summary is None:
        raise Stopped(folder, "stopped", stopped)
    if not as_json:
        console.print(summary_table(summary))
        click.echo(f"everything is in {folder}")
