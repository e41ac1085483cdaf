"""Runs whose problems do not wait for each other: the rows of lockstep, and exactly resumable."""

import dataclasses
import shutil
import signal
import time

import pytest

from mlx_fd import runs
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend
from mlx_fd.runs.events import BatchDone, Step
from mlx_fd.runs.manifest import check_same
from mlx_fd.training import planning
from support.draws import ALL
from support.loops import Killed, assert_same, count_syncs, rows, start
from support.manifests import manifest
from support.pairs import SMALL, make_dirs, make_plan
from support.shell import failed, launch, shell

CONTINUOUS = {"batching": "continuous", "places": 3, "episodes": 8, "checkpoint_every": 2}
# Every text is drawn, and dropout draws, too.
DRAWN = {"answer_temperature": 1.0, "student_temperature": 0.8, "expert_temperature": 0.6}
DRAWN |= {"lora_dropout": 0.1, "answers_by": "student"}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


@pytest.fixture(scope="module")
def whole(dirs, tmp_path_factory):
    """A run that is not interrupted: its folder, plan, events and number of flushes."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    plan, events = make_plan(*dirs, **CONTINUOUS, **DRAWN), []
    with pytest.MonkeyPatch.context() as patch:
        flushes = count_syncs(patch, limit=0)
        start(folder, plan, events.append)
    return folder, plan, events, flushes()


def assert_alike(one, other, at=""):
    """The same but for the last digits of numbers that were computed."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_alike(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for place, both in enumerate(zip(one, other, strict=True)):
            assert_alike(*both, f"{at}/{place}")
    elif isinstance(one, float) and isinstance(other, float):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-3), at
    else:
        assert one == other, at


@pytest.mark.parametrize(
    "options",
    [
        {"answers_by": "expert"},
        {"answers_by": "both", "max_disagreement": 0.1, "expert_verdicts": "privileged"},
        {"answers_by": "student", "student_context": "feedback"},
    ],
    ids=lambda options: "-".join(options.values() if len(options) == 1 else options),
)
def test_greedy_rows_gate_and_updates_are_those_of_lockstep(options, dirs, tmp_path):
    options = {**CONTINUOUS, **options, "episodes": 4, "checkpoint_every": 4}
    start(tmp_path / "continuous", make_plan(*dirs, **options))
    options |= {"batching": "lockstep", "places": 0}
    start(tmp_path / "lockstep", make_plan(*dirs, **options))
    for name in (runs.EPISODES, runs.METRICS, runs.SAMPLES):
        pair = (rows(tmp_path / how, name) for how in ("lockstep", "continuous"))
        assert_alike(*map(list, pair), name)


def test_the_next_batch_begins_before_the_end_of_one(whole):
    """But where a checkpoint is due, and the student learns between two of them."""
    found, order = whole[2], []
    for event in found:
        if isinstance(event, BatchDone):
            order.append(f"done {event.done}")
        elif isinstance(event, Step) and event.step in ("answer", "final"):
            order.append(f"{event.step} {event.batch}")
    first = order.index("answer 1")
    assert first < order.index("done 2")
    # No answer of the third batch before the second one is done.
    assert order.index("answer 2") > order.index("done 4")
    assert sorted(runs.read_lines(whole[0] / runs.EPISODES), key=lambda row: row["episode"]) == (
        runs.read_lines(whole[0] / runs.EPISODES)
    )
    kept = [path.name for path in (whole[0] / runs.CHECKPOINTS).iterdir() if path.name.isdigit()]
    assert all(int(name) % 2 == 0 for name in kept)


def test_one_seed_is_one_run_whatever_the_number_of_places(whole, dirs, tmp_path):
    folder, plan, _, _ = whole
    start(tmp_path / "again", plan)
    assert_same(folder, tmp_path / "again")
    alone = make_plan(*dirs, **{**CONTINUOUS, "places": 1}, **DRAWN)
    asked = iter([False, *[True] * 9])
    assert start(tmp_path / "one", alone, stop=lambda: next(asked)) is None
    for one, other in zip(rows(folder)[:2], rows(tmp_path / "one")[:2], strict=True):
        assert_alike(one, other)


def test_a_stopped_run_ends_at_a_checkpoint_and_goes_on_as_if_it_had_not(whole, tmp_path):
    folder, plan, _, _ = whole
    asked = iter([False, *[True] * 9])
    assert start(tmp_path / "run", plan, stop=lambda: next(asked)) is None
    assert len(rows(tmp_path / "run")) == 4
    start(tmp_path / "run", plan)
    assert_same(folder, tmp_path / "run")


def test_dying_at_any_flush_and_resuming_changes_nothing(whole, tmp_path, monkeypatch):
    folder, plan, _, total = whole
    for limit in (total // 3, *([total // 2] if ALL else []), 4 * total // 5):
        target = tmp_path / f"died{limit}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_syncs(patch, limit)
            start(target, plan)
        start(target, plan)
        assert_same(folder, target)
        shutil.rmtree(target)


def test_a_sigkill_amid_a_batch_changes_nothing(whole, dirs, tmp_path):
    options = {**SMALL, **CONTINUOUS, **DRAWN}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    loop = ("loop", "--expert", dirs[0], "--student", dirs[1], *given, "--out")
    target = tmp_path / "killed"
    running = launch(*loop, target, cwd=tmp_path)
    episodes = target / runs.EPISODES
    while running.process.exitcode is None and not (
        episodes.exists() and len(episodes.read_bytes().splitlines()) >= 6
    ):
        time.sleep(0.005)
    running.process.kill()
    done = running.wait()
    assert done.status == -signal.SIGKILL, done.flat
    # The third batch of two is in the log, and in no checkpoint.
    done = shell("resume", target, cwd=tmp_path)
    assert done.status == 0, done.flat
    assert_same(whole[0], target)


def test_a_profile_counts_what_was_done(dirs, tmp_path):
    plan = make_plan(*dirs, **CONTINUOUS, profile=True)
    summary = start(tmp_path / "run", plan)
    counts = summary["work"]["counts"]
    written = sum(sum(row["tokens"].values()) for row in rows(tmp_path / "run"))
    assert counts["written"]["least"] == written <= counts["written"]["done"]
    assert counts["steps"]["least"] <= counts["steps"]["done"] < written
    for name in ("expert_prompts", "student_prompts", "learned"):
        assert counts[name]["done"] >= counts[name]["least"] > 0


def test_a_new_run_says_how_it_writes_and_an_older_one_stays_in_lockstep():
    settled = planning._settled(Config()).generation.batching
    assert settled == ("lockstep" if backend().on_cpu else "continuous")
    alone = override(Config(), {"sequential": True}, "test")
    assert planning._settled(alone).generation.batching == "lockstep"
    old = manifest()
    for name in ("batching", "places"):
        del old["options"][name]
    assert check_same(old, manifest(), "run") == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batching": "continuous", "sequential": True}, "one problem at a time"),
        ({"batching": "lockstep", "places": 4}, "places is for batching = continuous"),
    ],
)
def test_what_does_not_go_together_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        override(Config(), options, "test")


def test_places_are_refused_where_auto_is_lockstep(dirs, tmp_path):
    loop = ("loop", "--expert", dirs[0], "--student", dirs[1], "--places", "4", "--sequential")
    failed(shell(*loop, "--out", tmp_path / "run", cwd=tmp_path), "--batching continuous")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(planning.ranks, "processes", lambda: 2)
    config = override(Config(), {"batching": "continuous"}, "test")
    with pytest.raises(UserError, match="in one process"):
        planning._check_ranks(config)
    auto = planning._settled(override(Config(), {"template_date": "2026-11-28"}, "test"))
    assert auto.generation.batching == "lockstep"


@pytest.mark.parametrize(("name", "value"), [("checkpoint_every", 9), ("episodes", 800)])
def test_what_says_where_batches_overlap_may_not_be_changed(name, value, tmp_path):
    alike = {"lr_schedule": "constant", "gate": "always", "batching": "continuous"}
    with pytest.raises(UserError, match=f"{name} was"):
        check_same(manifest(**alike), manifest(**alike, **{name: value}), tmp_path)


def test_the_flags_are_short_forms(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("batching = 'lockstep'\n")
    for flag, says in (("--continuous", "one problem at a time"), ("--lockstep", "places is for")):
        given = ("loop", "--config", config, flag, "--sequential", "--places", "2")
        failed(shell(*given, "--out", tmp_path / "run", cwd=tmp_path), says)
    assert dataclasses.fields(Config)
