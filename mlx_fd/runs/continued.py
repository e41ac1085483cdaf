"""The configuration of a run that goes on with an earlier one's student: what it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fd import problems, runs
from mlx_fd.config import PRESETS, Config, ProblemOptions, check_command, options_in, read
from mlx_fd.errors import UserError
from mlx_fd.problems.questions import question_key
from mlx_fd.registry import SOURCES
from mlx_fd.runs.plan import configuration

# Of few problems, the share that is held out for the gate.
_PROBE = 5


def loop_configuration(
    preset_name: str | None, file: Path | None, given: Mapping[str, Any], where: str
) -> Config:
    """The configuration of a loop, for the command line and for Python alike.

    With ``continue_from``, given or in the file, what is not given is the earlier run's.

    Args:
        preset_name: as for :func:`mlx_fd.runs.plan.configuration`, like all that follow.
        file: a TOML file.
        given: option name to value; ``None`` where it was not given.
        where: named in errors as what gave the options.

    Raises:
        UserError: an unknown preset or option, a value that will not do, or a configuration of
            another command; what is gone on with is no run, or its problems will not do.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    in_file = {} if file is None else options_in(file)
    run = changes.get("continue_from", in_file.get("continue_from"))
    if not isinstance(run, str) or not run:
        config = configuration(preset_name, file, changes, where)
        check_command(config, "loop", file)
        return config
    path = earlier_config(run)
    earlier = read(path)
    check_command(earlier, "loop", path)
    config = configuration(preset_name, file, changes, where, earlier)
    check_command(config, "loop", file)
    asked = {**PRESETS.get(preset_name or "", {}), **in_file, **changes}
    # A file that says nothing of the earlier run may be its own, or that of its like.
    meant = {**(in_file if in_file.get("continue_from") else {}), **changes}
    rest: dict[str, Any] = {}
    if "warm_up" not in meant:
        # What an earlier run began with is learned already.
        rest["warm_up"] = ""
    if "answer_kind" not in meant:
        rest["answer_kind"] = asked_kind(config.problems, run)
    if "problems" in asked:
        if "columns" not in asked:
            # The earlier run's columns are those of its own file.
            rest["columns"] = ""
        rest |= sizes({**asked, **rest}, earlier)
    return configuration(preset_name, file, {**changes, **rest}, where, earlier)


def earlier_config(run: str) -> Path:
    """The configuration of the run that is gone on with.

    Raises:
        UserError: it is no run.
    """
    folder = Path(run).expanduser()
    if not runs.is_run(folder):
        raise UserError(f"--continue {run}: this is no run directory of mlx-fd loop")
    return folder / runs.CONFIG


def asked_kind(options: ProblemOptions, run: str) -> str:
    """The kind of answers that problems are read with: that of the earlier run's student.

    It is asked in the form of that kind, and rows need not say which it is: years may be texts.

    Args:
        options: of the run that is made.
        run: the one that is gone on with.

    Raises:
        UserError: that is no run.
    """
    if options.answer_kind != "auto" or options.problems in SOURCES:
        return options.answer_kind
    folder = earlier_config(run).parent
    kind: str = runs.read_manifest(folder)["problems"].get("kind", "number")
    return kind


def sizes(given: Mapping[str, Any], earlier: Config) -> dict[str, int]:
    """How many problems of a file are learned from and held out, where the user does not say: all.

    Args:
        given: the options that were given; ``problems`` among them.
        earlier: of the run that is gone on with; its options hold where none is given.

    Raises:
        UserError: the problems cannot be read, are fewer than two, or would all be held out.
    """
    if given.get("episodes") is not None:
        return {}
    skip = given.get("skip_bad_rows")
    found = problems.load(
        given["problems"],
        given.get("split") or earlier.problems.split,
        skip_bad_rows=earlier.problems.skip_bad_rows if skip is None else bool(skip),
        kind=given.get("answer_kind") or "auto",
        columns=given.get("columns") or "",
    )
    # One question counts once: a probe's must not come up again.
    count = len({question_key(problem.question) for problem in found.problems})
    if count < 2:
        raise UserError(
            f"{given['problems']}: it has {count} problem; one more at least is needed, to be held "
            "out"
        )
    most = earlier.episode.probe_size
    probe = given.get("probe_size") or min(most, max(1, count // _PROBE))
    if probe >= count:
        raise UserError(
            f"--probe-size {probe}: {given['problems']} has {count} problems, and one at least is "
            f"to be learned from; ask for at most {count - 1}"
        )
    return {"episodes": count - probe, "probe_size": probe}
