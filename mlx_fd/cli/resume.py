"""``mlx-fd resume``."""

from __future__ import annotations

from pathlib import Path

import click

from mlx_fd.cli import self_distill as selfdistilling
from mlx_fd.cli.options import (
    PathType,
    debug_option,
    json_option,
    quiet_option,
    track_option,
)
from mlx_fd.cli.run_command import run_loop
from mlx_fd.config import Config, read
from mlx_fd.errors import UserError
from mlx_fd.files import write_json
from mlx_fd.runs.tracking import check_installed


@click.command(
    short_help="Continue a stopped run exactly where it stopped.",
    epilog="""\b
Examples:
  mlx-fd resume runs/20260101-120000
  mlx-fd resume runs/20260101-120000 --track tensorboard
  mlx-fd resume runs/20260101-120000 --redo-from-checkpoint
""",
)
@click.argument("run", type=PathType())
@click.option(
    "--redo-from-checkpoint",
    "redo",
    is_flag=True,
    help="If checkpoints are missing or damaged, redo everything after the newest intact one (or "
    "the whole run). The files it replaces are kept in RUN/cut.",
)
@track_option
@json_option
@quiet_option
@debug_option
def resume(
    run: Path, redo: bool, trackers: tuple[str, ...], as_json: bool, quiet: bool, debug: bool
) -> None:
    """Continue a stopped run exactly where it stopped.

    RUN is a run directory of `mlx-fd loop` or `mlx-fd self-distill`; the exit status is theirs. A
    run whose checkpoints are missing or damaged is left unchanged, and a message says what to do.
    """
    from mlx_fd.models.backend import backend

    check_installed(trackers)
    backend()
    from mlx_fd import runs
    from mlx_fd.runs.checked import with_digest
    from mlx_fd.runs.checkpoints import check_nothing_lost
    from mlx_fd.runs.manifest import changed_options, check_same
    from mlx_fd.runs.plan import make_plan

    manifest = runs.read_manifest(run)
    with runs.locked(run):
        config = read(run / runs.CONFIG)
        if not redo:
            # Before models are loaded and anything is written.
            check_nothing_lost(run, config.episode.checkpoint_every)
        _check_models(run, config)
        plan = selfdistilling.plan_of(config) if config.self_distils else make_plan(config)
        warnings = check_same(manifest, plan.manifest, run)
        warnings += changed_options(manifest, plan.manifest)
        if fault := runs.manifest_fault(run):
            warnings.append(fault)
        with runs.wrap_write_errors(run):
            # A run that was made longer is compared with its new length next time.
            manifest["options"] = plan.manifest["options"]
            write_json(run / runs.MANIFEST, with_digest(manifest))
        if config.self_distils:
            selfdistilling.start(
                run, plan, warnings, trackers, as_json, quiet, new=False, redo=redo
            )
        else:
            run_loop(run, plan, warnings, trackers, as_json, quiet, new=False, redo=redo)


def _check_models(run: Path, config: Config) -> None:
    """Make sure that the run's models are where they were.

    Raises:
        UserError: a model's directory is gone; the message says how the run is told of another.
    """
    from mlx_fd import runs
    from mlx_fd.models.resolve import parse_name

    roles = ("student",) if config.self_distils else ("expert", "student")
    for role in roles:
        path = Path(parse_name(getattr(config.models, role)).base)
        if path.is_absolute() and not path.exists():
            raise UserError(
                f"{run}: the directory of its {role}, {path}, does not exist; bring it back, or "
                f"write where it is now as {role} in {run / runs.CONFIG}"
            )
