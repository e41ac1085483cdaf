"""A loop whose student first learns to answer: one run directory, whole at any stop."""

import dataclasses
import io
import json

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_fd import resume_run, run_loop, runs
from mlx_fd.cli.terminal.summary import summary_table
from mlx_fd.cli.terminal.warm_up import WarmUpDisplay
from mlx_fd.config import Config, override, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import open_pair
from mlx_fd.report.page import make_page
from mlx_fd.report.reading import read_runs
from mlx_fd.runs.events import BatchDone, WarmedUp
from mlx_fd.runs.records.manifest import SCHEMA_VERSION
from mlx_fd.training.job import Job
from mlx_fd.training.loop import run
from mlx_fd.training.warm_up import run_warm_up, warm_up_config
from support.loops import Killed, assert_same, count_syncs, rows
from support.pages import parsed
from support.pairs import make_dirs, make_home, make_plan, without_seconds

MANIFEST = {
    "schema_version": SCHEMA_VERSION,
    "versions": {},
    "backend": {},
    **{part: {"name": part, "sha256": "0", "path": ""} for part in ("expert", "student")},
    "problems": {"name": "gsm8k", "split": "train", "sha256": "0", "skipped_rows": 0},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    made = make_plan(
        *make_dirs(tmp_path_factory.mktemp("pair")), warm_up="distil:5", episodes=4, exam_size=0
    )
    return dataclasses.replace(made, manifest={**MANIFEST, "options": {}})


def start(folder, plan, stop=lambda: False, report=lambda event: None):
    """Begin or resume a run in this process, as the command line does."""
    pair = open_pair(plan)

    def warm_up(stop):
        return run_warm_up(folder, plan, pair, report, stop)

    with runs.locked(folder):
        if not runs.is_run(folder):
            runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, report, stop)
        return run(job, pair, warm_up=warm_up)


def timeless(value):
    """A summary without its timings and what a process measures."""
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if key not in ("seconds", "peak_memory_bytes")
        }
    return value


def assert_same_run(one, two):
    assert_same(one, two)
    inner = one / runs.WARM_UP, two / runs.WARM_UP
    assert_same(*inner)
    assert rows(inner[0], runs.ATTEMPTS) == rows(inner[1], runs.ATTEMPTS)
    whole, again = (json.loads((folder / runs.SUMMARY).read_text()) for folder in (one, two))
    for summary in (whole, again):
        del summary["content_sha256"]
    assert timeless(whole) == timeless(again)


@pytest.fixture(scope="module")
def counted(plan, tmp_path_factory):
    """An uninterrupted run, its summary, and how often it flushed to the disk."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        seen = count_syncs(patch, limit=0)
        return folder, start(folder, plan), seen()


@pytest.fixture(scope="module")
def whole(counted):
    return counted[:2]


def test_the_loop_begins_with_what_the_warm_up_ended_with(plan, whole):
    folder, summary = whole
    found = summary["warm_up"]
    assert found["attempts"]["n"] == 5 and found["updates"]["steps"] == 3
    assert found["health"]["first"]["tokens"] > 0
    assert summary["seconds"]["warm_up"] == found["seconds"]["total"] > 0
    assert summary["seconds"]["total"] > found["seconds"]["total"]
    first, last = (
        mx.load(str(run / "checkpoints" / name / "adapters.safetensors"))
        for run, name in ((folder, "000000"), (folder / runs.WARM_UP, "last"))
        if (run / "checkpoints" / name).exists()
    )
    assert all(mx.array_equal(first[name], last[name]) for name in last)
    assert any(mx.any(last[name] != 0) for name in last if name.endswith("lora_b"))
    # Its problems are the split's, and neither the loop's nor held out.
    warmed = {row["id"] for row in runs.read_attempts(folder / runs.WARM_UP)}
    assert warmed == {problem.id for problem in plan.warm_up} and len(warmed) == 5
    assert not warmed & {problem.id for problem in (*plan.problems, *plan.probe)}
    assert all(name.startswith("gsm8k-train") for name in warmed)
    assert [row["id"] for row in rows(folder)] == [problem.id for problem in plan.problems]


def test_stopping_after_any_batch_and_resuming_changes_nothing(plan, whole, tmp_path):
    stopped, stops = tmp_path / "stopped", 0
    while True:
        # Both ask before their first batch, and after each.
        looks = iter([False])
        if start(stopped, plan, lambda looks=looks: next(looks, True)) is not None:
            break
        stops += 1
    assert stops == 4
    assert_same_run(whole[0], stopped)


def test_dying_at_a_flush_and_resuming_changes_nothing(plan, counted, tmp_path, monkeypatch):
    """In the warm-up, and in the loop; tests/training/test_loop.py dies everywhere."""
    folder, _, total = counted
    for limit in (total // 3, 9 * total // 10):
        target = tmp_path / f"died{limit}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            count_syncs(patch, limit)
            start(target, plan)
        start(target, plan)
        assert_same_run(folder, target)


def test_another_warm_up_is_not_gone_on_with(plan, whole, tmp_path):
    looks = iter([False, True])
    folder = tmp_path / "other"
    assert start(folder, plan, lambda: next(looks, True)) is None
    other = dataclasses.replace(plan, config=override(plan.config, {"warm_up_rate": 0.5}, "test"))
    with pytest.raises(UserError, match=r"warm_up.*lora_rate was"):
        start(folder, other)


def test_its_options_are_the_methods_and_the_loops():
    loop = override(Config(), {"expert": "tiny", "warm_up": "gkd:200", "batch_size": 8}, "test")
    found = warm_up_config(loop)
    assert found.selfdistill.objective == "jsd" and found.losses.on_policy_fraction == 0.5
    assert found.problems.episodes == 200 and found.generation.batch_size == 8
    assert found.models == loop.models and found.selfdistill.critic == "tiny"
    # The tiny models' rate belongs to a LoRA scale of 4, and the loop's is 2.
    assert found.training.lora_rate == pytest.approx(2e-3)
    given = override(loop, {"warm_up_rate": 1e-5, "temperature": 0.5, "first_tokens": 4}, "test")
    found = warm_up_config(given)
    assert found.training.lora_rate == 1e-5
    assert (found.selfdistill.temperature, found.selfdistill.first_tokens) == (0.5, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warm_up": "distil"}, "a method and a number of problems"),
        ({"warm_up": "distil:0"}, "a method and a number of problems"),
        ({"warm_up": "grpo:20"}, "there is no method 'grpo'"),
        ({"warm_up": "distil:20", "train": "full"}, "train lora"),
        ({"warm_up": "distil:20", "method": "gkd"}, "warm_up is for mlx-fd loop"),
    ],
)
def test_what_cannot_be_a_warm_up_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        warm_up_config(override(Config(), changes, "test"))


def test_from_a_file_to_the_report(tmp_path):
    """As a user runs it: options from a file, a stop in the warm-up, the display, the page."""
    make_home(tmp_path)
    sizes = {"batch_size": 2, "max_answer_tokens": 6, "max_feedback_tokens": 6, "probe_size": 2}
    options = override(Config(), {**sizes, "warm_up": "sft:4", "expert_answers": "all"}, "test")
    (tmp_path / "options.toml").write_text(to_toml(options))
    assert read(tmp_path / "options.toml") == options
    names = {"expert": str(tmp_path / "expert"), "student": str(tmp_path / "student")}
    events, looks, out = [], iter([False, True]), tmp_path / "run"
    begun = run_loop(
        **names,
        problems=tmp_path / "problems.jsonl",
        config=tmp_path / "options.toml",
        episodes=4,
        out=out,
        stop=lambda: next(looks, True),
        on_event=events.append,
    )
    assert not begun.done and not any(isinstance(event, WarmedUp) for event in events)
    done = resume_run(out, on_event=events.append)
    assert done.summary["warm_up"]["expert_answers"] == {"n": 4, "right": 0, "taught": 4}
    assert [event.done for event in events if isinstance(event, BatchDone)] == [2, 4, 2, 4]
    # The folder alone is a run of distillation, which is done.
    assert resume_run(out / runs.WARM_UP).summary == done.summary["warm_up"]
    text = io.StringIO()
    with WarmUpDisplay(Console(file=text, width=200)) as display:
        for event in events:
            display(event)
    display._now._console.print(summary_table(done.summary))
    assert "warm-up done: held-out problems right: 0 before" in text.getvalue()
    assert "distilled" in text.getvalue() and "2 steps" in text.getvalue()
    page = " ".join(parsed(make_page(read_runs([out]))).text)
    assert "Warm-up" in page and "Totals of the warm-up" in page
    assert without_seconds(runs.read_metrics(out))
    with pytest.raises(UserError, match=r"has 40 problems.*6 problems of a warm-up.*at most 38"):
        run_loop(
            **names,
            problems=tmp_path / "problems.jsonl",
            episodes=36,
            probe_size=2,
            warm_up="distil:6",
            out=tmp_path / "no",
        )
