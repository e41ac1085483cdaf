"""Runs of the loop in this process, and what two runs of one seed have in common."""

import json
import os

import mlx.core as mx
import numpy as np

from mlx_fd import runs
from mlx_fd.config import to_toml
from mlx_fd.feedback.pair import open_pair
from mlx_fd.training.job import Job
from mlx_fd.training.loop import run
from support.pairs import MEASURED, without_seconds

WEIGHTS = ("adapters.safetensors", "heads.safetensors", "optimizer.safetensors")


def start(folder, plan, report=lambda event: None, stop=lambda: False):
    """Begin or resume a run in this process, as the command line does."""
    with runs.locked(folder):
        if not runs.is_run(folder):
            runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, report, stop)
        return run(job, open_pair(plan))


def rows(folder, name=runs.EPISODES):
    return without_seconds(runs.read_lines(folder / name))


def weights(folder, which="last"):
    found = {}
    for name in WEIGHTS:
        loaded = mx.load(str(folder / "checkpoints" / which / name))
        found.update({f"{name}:{key}": np.array(value) for key, value in loaded.items()})
    return found


def assert_same(one, two):
    """Two finished runs are one: every row but its seconds, every weight to the last bit."""
    assert rows(one) == rows(two)
    assert rows(one, runs.METRICS) == rows(two, runs.METRICS)
    for which in ("last", "best"):
        a, b = weights(one, which), weights(two, which)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a), which
    state_a, state_b = (
        json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
        for folder in (one, two)
    )
    for state in (state_a, state_b):
        # Digests and log lengths differ with the seconds in the logs.
        for measured in MEASURED:
            del state[measured]
    assert state_a == state_b


class Killed(BaseException):
    """Ends a run in this process as suddenly as an exception can."""


def count_syncs(monkeypatch, limit):
    """Let the process die at its ``limit``-th flush to the disk."""
    seen = 0
    sync = os.fsync

    def dying(descriptor):
        nonlocal seen
        seen += 1
        if seen == limit:
            raise Killed
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", dying)
    return lambda: seen
