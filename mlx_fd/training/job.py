"""What a trainer works on, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_fd.config import Config
from mlx_fd.problems import Problem
from mlx_fd.runs.events import Event


def never() -> bool:
    """Goes on to the end."""
    return False


@dataclass(frozen=True)
class Job:
    """A run that begins or goes on; the caller holds the run directory's lock.

    Attributes:
        folder: the run directory, as :func:`mlx_fd.runs.directory.create` made it.
        config: the run's configuration.
        probe_problems: held out, for the gate, headroom and the best checkpoint.
        problems: the run's problems, in order.
        report: takes every event.
        stop: asked after each batch; when true, a checkpoint is written and the run ends there.
        redo: go back to the newest whole checkpoint, whatever was done after it.
    """

    folder: Path
    config: Config
    probe_problems: Sequence[Problem]
    problems: Sequence[Problem]
    report: Callable[[Event], None]
    stop: Callable[[], bool] = never
    redo: bool = False
