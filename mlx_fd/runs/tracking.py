"""Live tracking: a run's numbers for TensorBoard, Weights & Biases or trackio, while it goes.

This is an observer of the run's events, as the display is one. A step is a batch. A resumed run
does once more what came after its last checkpoint, and comes to the same numbers: steps that a
tracker has are not written to it again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_fd.errors import UserError
from mlx_fd.files import check_way, write_json
from mlx_fd.problems.kinds import known
from mlx_fd.runs.checked import read_checked, with_digest
from mlx_fd.runs.events import BatchDone, Event, Probed
from mlx_fd.runs.records.tracking import TrackerRow
from mlx_fd.runs.summary import good_by_expert

# What each has seen of a run, in the run directory.
STATE = "tracking.json"
_PROJECT = "mlx-fd"


class Writer(Protocol):
    """Where numbers go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take a step's numbers."""

    def close(self) -> None:
        """Make sure that they have arrived."""


class _TensorBoard:
    """Event files in the run directory's ``tensorboard/``, which the tensorboard package writes."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]):
        from tensorboard.summary import Writer

        self._writer = Writer(str(check_way(folder, "tensorboard")))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it in the run directory only."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]):
        import wandb

        check_way(folder, "wandb")
        self._run = wandb.init(
            project=_PROJECT,
            name=folder.name,
            id=key,
            resume="allow",
            dir=folder,
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio, in its own store on this machine (``TRACKIO_DIR``)."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]):
        import trackio

        self._run = trackio.init(
            project=_PROJECT, name=f"{folder.name}-{key}", resume="allow", config=dict(config)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


# Each is the name of a package, of an extra, and of what --track takes.
_WRITERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
TRACKERS = tuple(_WRITERS)


def check_installed(names: Sequence[str]) -> None:
    """Make sure, before a run begins, that it can be tracked.

    Raises:
        UserError: a tracker's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'--track {name}: its package is not installed; pip install "mlx-fd[{name}]"'
            )


def values_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """An event's step and numbers, by ``group/name``; ``None`` where it has none."""
    if isinstance(event, Probed):
        return 0, {f"probe/{name}": value for name, value in event.first.items()}
    if not isinstance(event, BatchDone):
        return None
    row = event.metrics
    values: dict[str, float | None] = {
        "gate/frozen": float(row["frozen"]),
        "gate/lagging": float(row["lagging"]),
        "time/seconds": row["seconds"],
    }
    values |= {f"weight/{name}": value for name, value in row["weights"].items()}
    values |= {f"probe/{name}": value for name, value in (row["probe"] or {}).items()}
    gains = row["stop"]["gains"] if row["stop"] else {}
    values |= {f"gain/{name}": value for name, value in gains.items()}
    if row["updates"]:
        last = row["updates"][-1]
        values |= {f"loss/{name}": value for name, value in last["losses"].items()}
        values |= {"update/total": last["total"], "update/gradient_norm": last["gradient_norm"]}
    if "accepted" in row:
        values["draft/accepted"] = row["accepted"]["count"] / row["accepted"]["n"]
    if "attempts" in row:
        if row["clipped"]:
            values["update/clipped"] = row["clipped"][-1]
        attempts = row["attempts"]
        values |= {
            "attempts/reward": attempts["reward"],
            "attempts/teaches": attempts["teaches"],
            "attempts/finished": attempts["finished"],
            "attempts/tokens": attempts["tokens"],
            "attempts/entropy": attempts["entropy"],
            "attempts/mean_abs_advantage": attempts["mean_abs_advantage"],
            "attempts/negative_on_right": attempts["negative_on_right"],
            "attempts/logprob_gap": attempts["logprob_gap"],
        }
        if health := row.get("health"):
            values |= {f"health/{name}": health[name] for name in ("overlap", "reverse_kl")}
    # Answers of which it is known whether they are right; without gold, by the expert's verdict.
    answers = {
        "accuracy/first_answers": [
            o["correct_before"] for o in event.rows if "correct_before" in o
        ],
        "accuracy/final_answers": [o["correct_after"] for o in event.rows if "correct_after" in o],
        "accuracy/attempts": [
            o["correct"] for o in event.rows if "correct" in o and not o.get("by_expert")
        ],
        "expert_verdict/first_answers_good": [
            good_by_expert(o)
            for o in event.rows
            if "correct_before" in o and o["correct_before"] is None
        ],
    }
    for name, rights in answers.items():
        if of := known(rights):
            values[name] = sum(of) / len(of)
    return row["batch"] + 1, {name: value for name, value in values.items() if value is not None}


class Tracking:
    """Writes a run's numbers to trackers. Use as a context manager, and call with each event.

    A tracker that fails is dropped with one warning; the run goes on.

    Args:
        names: of :data:`TRACKERS`.
        folder: the run directory.
        config: the run's options, for the trackers that show them.
        warn: told of what fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        self._names = tuple(dict.fromkeys(names))
        self._folder = folder
        self._config = config
        self._warn = warn
        self._state = _read_state(folder / STATE, warn)
        self._writers: dict[str, Writer] = {}
        self._begun = False

    def __enter__(self) -> Tracking:
        return self

    def _open(self) -> None:
        """Open the writers, once: when there is something to write.

        Some packages know one run at a time, and a loop's warm-up is one of its own before it.
        """
        if self._begun:
            return
        self._begun = True
        for name in self._names:
            known = self._state.setdefault(name, {"id": uuid.uuid4().hex[:8], "step": -1})
            with self._dropped_on_failure(name):
                writer = _WRITERS[name](self._folder, known["id"], self._config)
                self._writers[name] = writer

    def __exit__(self, *failure: Any) -> None:
        for name, writer in list(self._writers.items()):
            with self._dropped_on_failure(name):
                writer.close()

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        found = values_of(event) if self._names else None
        if found is None:
            return
        self._open()
        step, values = found
        for name, writer in list(self._writers.items()):
            if step <= self._state[name]["step"]:
                continue
            with self._dropped_on_failure(name):
                writer.write(step, values)
                self._state[name]["step"] = step
                write_json(self._folder / STATE, with_digest(self._state))

    @contextlib.contextmanager
    def _dropped_on_failure(self, name: str) -> Any:
        try:
            # Trackers greet on standard output, which belongs to the run's result.
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:
            self._writers.pop(name, None)
            self._warn(f"{name} fails, and the run goes on without it: {error}")


def _read_state(path: Path, warn: Callable[[str], None]) -> dict[str, TrackerRow]:
    """What trackers have seen of the run; nothing where that cannot be read."""
    try:
        state = dict(read_checked(path)[0])
        return {
            name: {"id": str(state[name]["id"]), "step": int(state[name]["step"])}
            for name in TRACKERS
            if name in state
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        warn(f"{path}: cannot be read ({error}); trackers see this run as a new one")
        return {}
