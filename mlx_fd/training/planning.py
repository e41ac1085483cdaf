"""A run before it begins: a new one from its options, one that goes on from its directory."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_fd import runs
from mlx_fd.config import Config, GateOptions, read
from mlx_fd.config.fields import CONTINUOUS
from mlx_fd.errors import UserError
from mlx_fd.feedback import gate, risk
from mlx_fd.files import write_json
from mlx_fd.models import ranks
from mlx_fd.models.resolve import parse_name
from mlx_fd.runs.manifest import check_alike
from mlx_fd.runs.plan import Plan, check_out


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A run directory of this second, made at once: no other run that begins now takes it.

    It is removed at the end where no run came of it.
    """
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent, number = Path("runs"), 1
    made = [] if parent.exists() else [parent]
    folder = parent / name
    while not _claims(folder):
        number += 1
        folder = parent / f"{name}-{number}"
    try:
        yield folder
    finally:
        for empty in (folder, *made):
            with contextlib.suppress(OSError):
                empty.rmdir()


def _claims(folder: Path) -> bool:
    """Make a folder, if it is free. Why it cannot be made otherwise, the checks of a run say."""
    if ranks.launched():  # the first of several processes makes it, once they have met
        return not folder.exists()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return not os.path.lexists(folder)
    except OSError:
        pass
    return True


def plan_of(config: Config) -> Plan:
    """Check everything a run needs, of the loop or of self-distillation; nothing large is loaded.

    Raises:
        UserError: a name, file, combination of options or amount of memory that will not do.
    """
    if config.self_distils:
        from mlx_fd.training.selfdistill.plan import make_plan

        return make_plan(config)
    from mlx_fd.runs import plan

    made = plan.make_plan(config)
    if not config.episode.warm_up:
        return made
    from mlx_fd.training.warm_up import check_warm_up

    return check_warm_up(made)


def new_plan(folder: Path, config: Config) -> Plan:
    """:func:`plan_of`, of a run that shall be made in a folder.

    Raises:
        UserError: as there; or the folder will not do, or there is no MLX backend.
    """
    from mlx_fd.models.backend import backend

    backend()
    config = _settled(config)

    ranks.share_batches(not config.models.shard_expert)

    def planned() -> Plan:
        check_out(folder)
        _check_ranks(config)
        plan = plan_of(config)
        if plan.config.models.continue_from:
            from mlx_fd.training.continuing import check_continues

            plan = check_continues(plan)
        return plan if config.self_distils else _check_trust(plan)

    plan = ranks.together(planned)
    check_alike(plan.manifest)
    return plan


def _check_trust(plan: Plan) -> Plan:
    """A loop's plan with a note where its student can never be trusted, as options ask for.

    At the usual ``max_disagreement`` nothing is said: a run of few episodes is a trial.

    Raises:
        UserError: it could not in the longest run.
    """
    options, size = plan.config.gate, plan.config.generation.batch_size
    if not gate.may_trust(options):
        return plan
    needed, count = gate.fewest_verdicts(options), len(plan.problems)
    at = f"at max_disagreement {options.max_disagreement:g} trust needs {needed} verdicts"
    if 0 < options.audit_window < needed:
        raise UserError(
            f"audit_window is {options.audit_window}, and {at}: give at least {needed}, or leave "
            "audit_window out"
        )
    seen = risk.last_look(math.ceil(count / size)) * size
    if seen >= needed or options.max_disagreement >= GateOptions().max_disagreement:
        return plan
    note = (
        f"{at}, and this run has {count} episodes, {seen} of them by the last look that could "
        "grant it: the expert will always be asked"
    )
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def _check_ranks(config: Config) -> None:
    """Make sure that several ranks can make a run, where there are several.

    Raises:
        UserError: they would each do the whole work, or parts of it are not theirs to divide.
    """
    sharded = config.models.shard_expert
    if ranks.processes() > 1 and config.generation.batching == CONTINUOUS:
        raise UserError(
            "batching = continuous is for a run in one process: use --batching lockstep, or start "
            "without mlx.launch"
        )
    if config.generation.places and config.generation.batching == "lockstep":
        raise UserError(
            "places is for batching = continuous, and auto is lockstep on the CPU, for several "
            "processes, and with sequential or speculate: leave places out, or use --batching "
            "continuous"
        )
    if ranks.processes() == 1:
        if sharded:
            raise UserError(
                "shard_expert divides the expert among several processes, and this is one: start "
                "with mlx.launch (docs/several-machines.md)"
            )
        return
    if sharded and config.losses.needs_attention:
        raise UserError(
            "the attention loss reads all heads of the expert, of which each process has some with "
            "shard_expert: leave one of the two out"
        )
    if sharded and config.self_distils:
        raise UserError("shard_expert is for mlx-fd loop: leave it out")
    if sharded and config.generation.speculate:
        raise UserError(
            "speculate is for an expert that is in one process, and shard_expert divides it: leave "
            "one of the two out"
        )
    for name, alone in (
        ("student_context", config.losses.student_context != "none"),
        ("profile", config.episode.profile),
    ):
        if alone and ranks.size() > 1:
            raise UserError(
                f"{name} is for a run in one process: leave it out, or start without mlx.launch"
            )


def _settled(config: Config) -> Config:
    """The configuration with what is to stay as it is when its run begins.

    That is the day, also its templates' tomorrow, and how turns are written. In the file of a run
    that began before there was a choice stands ``auto``, and it goes on in lockstep.
    """
    from mlx_fd.models.backend import backend

    models, generation = config.models, config.generation
    if not models.template_date:
        today = ranks.from_first(datetime.date.today().isoformat().encode).decode()
        models = dataclasses.replace(models, template_date=today)
    if generation.batching == "auto" and not config.self_distils:
        alone = backend().on_cpu or ranks.processes() > 1 or generation.sequential
        alone = alone or generation.speculate > 0
        batching = "lockstep" if alone else CONTINUOUS
        generation = dataclasses.replace(generation, batching=batching)
    return dataclasses.replace(config, models=models, generation=generation)


@contextlib.contextmanager
def resumed_plan(folder: Path, *, redo: bool = False) -> Iterator[tuple[Plan, list[str]]]:
    """The plan of a run that is there, while its lock is held.

    Args:
        folder: the run directory.
        redo: let checkpoints be lost or damaged.

    Yields:
        The plan, and what the user should know: differences that make a bit-identical resume
        uncertain, options that were changed, a manifest that was.

    Raises:
        UserError: no run, or not what it began with; checkpoints are lost; or another process
            holds it.
    """
    from mlx_fd.models.backend import backend
    from mlx_fd.runs.checked import with_digest
    from mlx_fd.runs.checkpoints import check_nothing_lost
    from mlx_fd.runs.manifest import changed_options, check_same, trained_template

    backend()
    manifest = runs.read_manifest(folder)
    with runs.locked(folder):

        def planned() -> Plan:
            config = read(folder / runs.CONFIG)
            ranks.share_batches(not config.models.shard_expert)
            if not redo:
                # Before models are loaded and anything is written.
                check_nothing_lost(folder, config.episode.checkpoint_every)
            _check_models(folder, config)
            return plan_of(config)

        plan = ranks.together(planned)
        check_alike(plan.manifest)
        warnings = check_same(manifest, plan.manifest, folder)
        warnings += changed_options(manifest, plan.manifest)
        if fault := runs.manifest_fault(folder):
            warnings.append(fault)
        if "chat_template" in manifest:
            template = trained_template(manifest, plan.config, folder)
            plan = dataclasses.replace(plan, template=template or plan.template)
        with runs.wrap_write_errors(folder):
            # A run of an older version recorded none.
            manifest.setdefault("chat_template", plan.manifest["chat_template"])
            # A run that was made longer is compared with its new length next time.
            manifest["options"] = plan.manifest["options"]
            write_json(folder / runs.MANIFEST, with_digest(manifest))
        yield plan, warnings


def _check_models(folder: Path, config: Config) -> None:
    """Make sure that a run's models are where they were.

    Raises:
        UserError: a model's directory is gone; the message says how the run is told of another.
    """
    roles = ("student",) if config.self_distils else ("expert", "student")
    for role in roles:
        path = Path(parse_name(getattr(config.models, role)).base)
        if path.is_absolute() and not path.exists():
            raise UserError(
                f"{folder}: the directory of its {role}, {path}, does not exist; bring it back, or "
                f"write where it is now as {role} in {folder / runs.CONFIG}"
            )
