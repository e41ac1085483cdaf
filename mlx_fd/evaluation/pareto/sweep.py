"""Training each stopping threshold of a frontier for real, to see whether it stops where predicted.

Each is a run of its own under ``sweep/`` in the run directory, made by ``mlx-fd loop`` in a process
of its own, just as a user would make it.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlx_fd import runs
from mlx_fd.config import Config, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.evaluation.pareto.choice import gated
from mlx_fd.files import check_way
from mlx_fd.runs.checked import ChangedFile, read_checked
from mlx_fd.runs.records.pareto import ParetoFile, ParetoPointRow, RealStopRow
from mlx_fd.runs.records.summary import Summary

FOLDER = "sweep"
_POLL_SECONDS = 0.2


def sweep(
    folder: Path,
    config: Config,
    frontier: ParetoFile,
    progress: Callable[[str, int, int], None],
    came: list[int],
) -> list[ParetoPointRow] | None:
    """Train every point's threshold; runs that are done are read, begun ones are gone on with.

    Args:
        folder: the run directory whose frontier it is.
        config: its configuration.
        frontier: its frontier, as :func:`mlx_fd.evaluation.pareto.choice.judge` gave it.
        progress: called with the name of a run, its batches done, and all of its batches.
        came: signals that came so far, as :mod:`mlx_fd.cli.signals` collects them; they are passed
            on to the run under way, and the sweep ends with it.

    Returns:
        The frontier's points, each with an entry ``real`` (:func:`_real`); ``None`` where a signal
        ended the sweep.

    Raises:
        UserError: a run failed, or there is something else in its place.
    """
    planned = []
    for point in frontier["points"]:
        name = f"stop-{point['stop_threshold']:.16g}"
        run = check_way(folder, FOLDER, name)
        wanted = gated(config, point["stop_threshold"])
        if not (runs.is_run(run) and runs.is_ours(run)):
            runs.check_new(run, "move it away")
        elif read(run / runs.CONFIG) != wanted:
            raise UserError(f"{run}: the run here has another configuration; move it away.")
        planned.append((point, name, run, wanted))
    done: list[ParetoPointRow] = []
    for point, name, run, wanted in planned:
        if not (run / runs.SUMMARY).exists():
            _train(run, wanted, partial(progress, name), frontier["batches"], came)
        if came:
            return None
        done.append({**point, "real": _real(run, f"{FOLDER}/{name}", point)})
    return done


def _real(run: Path, name: str, point: ParetoPointRow) -> RealStopRow:
    """What became of a threshold's run, named ``name``, in the folder ``run``."""
    rows = runs.read_metrics(run)
    frozen = [row["frozen"] for row in rows]
    stopped = frozen.index(True) + 1 if True in frozen else None
    steps = sum(len(row["updates"]) for row in rows[:stopped])
    thawed = frozen.index(False, stopped) + 1 if stopped and False in frozen[stopped:] else None
    try:
        summary: Summary = read_checked(run / runs.SUMMARY)[0]
    except ChangedFile as error:
        raise UserError(
            f"{run / runs.SUMMARY}: {error}; make it again with: "
            f"mlx-fd resume {shlex.quote(str(run))}"
        ) from error
    losses = rows[stopped - 1]["probe"] if stopped else summary["probe"]["after"]
    predicted = (point["stopped_after_batch"], point["cost"]["kd_steps"], point["losses"])
    finals = summary["accuracy"]["final_answers"]
    low, high = finals["interval"] if finals["n"] else (None, None)
    return {
        "run": name,
        "stopped_after_batch": stopped,
        "kd_steps": steps,
        "as_predicted": (stopped, steps, losses) == predicted,
        "thawed_after_batch": thawed,
        "final_accuracy": {
            "value": finals["right"] / finals["n"] if finals["n"] else None,
            "low": low,
            "high": high,
            "n": finals["n"],
        },
    }


def _train(
    run: Path, config: Config, report: Callable[[int, int], None], batches: int, came: list[int]
) -> None:
    """Make or finish a run."""
    with _command(run, config) as command, tempfile.TemporaryFile("w+") as errors:
        # Its own session: a Ctrl-C at the terminal comes to it through us, and once.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_fd", *command, "--quiet"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        passed_on = 0
        while process.poll() is None:
            report(_batches(run), batches)
            time.sleep(_POLL_SECONDS)
            for number in came[passed_on:]:
                process.send_signal(number)
                passed_on += 1
        report(_batches(run), batches)
        if process.returncode and not came:
            errors.seek(0)
            raise UserError(
                f"{run}: this run of the sweep failed ({errors.read().strip()}). Those before it "
                "are done, and the same command goes on here."
            )


@contextlib.contextmanager
def _command(run: Path, config: Config) -> Iterator[list[str]]:
    """The arguments that make a run, or go on with it."""
    if runs.is_run(run):
        yield ["resume", str(run)]
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sweep.toml")
        file.write_text(to_toml(config), "utf-8")
        yield ["loop", "--config", str(file), "--out", str(run)]


def _batches(run: Path) -> int:
    return len(runs.read_lines(run / runs.METRICS))
