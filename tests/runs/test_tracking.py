"""Live tracking: what trackers get, read back with their own libraries."""

import importlib.util
import json
import sqlite3
import sys

import pytest

from mlx_fd import cli
from mlx_fd.errors import UserError
from mlx_fd.runs import tracking
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.events import BatchDone, Note, Probed
from mlx_fd.runs.tracking import Tracking, check_installed, values_of
from support import reported

FIRST = Probed({"lm": 1.0}, {"lm": 0.5}, {})


def batch(number, *, frozen=False):
    metrics = reported.metric(number, frozen=frozen)
    rows = [reported.episode(0), reported.episode(1, correct_after=False)]
    return BatchDone(4 * (number + 1), 12, rows, metrics)


def track(folder, *events, names=("tensorboard",)):
    """Track events as a process of a run would; what it warned of."""
    warned = []
    with Tracking(names, folder, {"seed": 0}, warned.append) as tracker:
        for event in events:
            tracker(event)
    return warned


def board(folder):
    """What TensorBoard reads of a run: tag -> step -> value; a step written twice fails."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    found = reading.EventAccumulator(str(folder / "tensorboard"), {reading.TENSORS: 0})
    found.Reload()
    read = {}
    for tag in found.Tags()["tensors"]:
        events = found.Tensors(tag)
        read[tag] = {event.step: float(make_ndarray(event.tensor_proto)) for event in events}
        assert len(read[tag]) == len(events), f"{tag} has a step twice"
    return read


def test_a_batch_is_a_step_with_its_numbers():
    assert values_of(Note("hello")) is None
    assert values_of(FIRST) == (0, {"probe/lm": 1.0})
    step, values = values_of(batch(2, frozen=True))
    assert step == 3
    assert values["loss/lm"] == values["probe/lm"] == 0.25
    assert values["gain/logit"] == 0.75
    assert values["weight/score"] == 0.25
    assert values["gate/frozen"] == 1.0
    assert values["accuracy/first_answers"] == 0.0
    assert values["accuracy/final_answers"] == 0.5
    assert values["update/total"] == 0.5


def test_what_is_not_there_is_not_written():
    row = reported.metric(0) | {"probe": None, "stop": None, "updates": []}
    _, values = values_of(BatchDone(4, 8, [], row))
    assert {name.split("/")[0] for name in values} == {"gate", "weight", "time"}
    row = reported.metric(0)
    row["updates"][-1]["losses"] |= {"lm": None}  # a loss that was not finite
    assert "loss/lm" not in values_of(BatchDone(4, 8, [], row))[1]


def test_tensorboard_reads_it_back_and_a_resumed_run_writes_nothing_twice(tmp_path):
    pytest.importorskip("tensorboard")
    assert track(tmp_path, FIRST, batch(0), batch(1), batch(2)) == []
    # Resumed from the checkpoint after batch 1: batch 2 is done again, to the same numbers.
    assert track(tmp_path, FIRST, batch(2), batch(3)) == []
    found = board(tmp_path)
    assert found["probe/lm"] == pytest.approx({0: 1.0, 1: 1 / 2, 2: 1 / 3, 3: 1 / 4, 4: 1 / 5})
    assert list(found["accuracy/final_answers"]) == [1, 2, 3, 4]
    assert json.loads((tmp_path / tracking.STATE).read_text())["tensorboard"]["step"] == 4


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    (warned,) = track(tmp_path, FIRST, batch(0), batch(1))
    assert warned.startswith("tensorboard fails, and the run goes on without it: ")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"tensorboard": 1}', "\x00", '{"wandb": {}}', "a changed step"]
)
def test_a_damaged_state_stops_nothing(tmp_path, content):
    pytest.importorskip("tensorboard")
    if content == "a changed step":
        state = with_digest({"tensorboard": {"id": "a", "step": 0}})
        content = json.dumps(state).replace('"step": 0', '"step": 9')
    (tmp_path / tracking.STATE).write_text(content)
    (warned,) = track(tmp_path, FIRST, batch(0))
    assert tracking.STATE in warned and "as a new one" in warned
    assert board(tmp_path)["probe/lm"] == {0: 1.0, 1: 0.5}


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in tracking.TRACKERS:
        with pytest.raises(UserError, match=rf'pip install "mlx-fd\[{name}\]"'):
            check_installed([name])
    out = str(tmp_path / "run")
    monkeypatch.setattr(
        sys, "argv", ["mlx-fd", "loop", "--preset", "tiny", "--track", "wandb", "--out", out]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--track wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: what it prints with --json."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-fd", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_real_run_is_tracked_and_so_is_what_was_added_to_it(tmp_path, call):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"

    small = {"episodes": 4, "batch-size": 2, "probe-size": 2, "exam-size": 0, "kd-steps": 1}
    small |= {"lr-schedule": "constant", "gate": "always"}
    small |= {f"max-{name}-tokens": 12 for name in ("answer", "feedback", "merge")}
    options = [text for name, value in small.items() for text in (f"--{name}", value)]
    call("loop", "--preset", "tiny", *options, "--track", "tensorboard", "--out", run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("episodes = 4", "episodes = 6"))
    call("resume", run, "--track", "tensorboard")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = board(run)
    assert list(found["weight/lm"]) == [1, 2, 3]
    assert found["weight/lm"] == pytest.approx(
        {row["batch"] + 1: row["weights"]["lm"] for row in rows}
    )
    assert list(found["gate/lagging"].values()) == [row["lagging"] for row in rows]
    result = call("report", run)
    assert result["runs"][0]["episodes"] == 6
    assert (run / "report.html").is_file()


def test_self_distillation_is_tracked_by_the_same_names(tmp_path, call):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"

    small = {"episodes": 4, "batch-size": 2, "probe-size": 2, "probe-every": 1, "lora-rank": 2}
    small["max-answer-tokens"] = 16
    options = [text for name, value in small.items() for text in (f"--{name}", value)]
    method = ("--method", "step-critique", "--critic", "truth")
    call("self-distill", *method, *options, "--track", "tensorboard", "--out", run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("episodes = 4", "episodes = 6"))
    call("resume", run, "--track", "tensorboard")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    found = board(run)
    right = {
        n + 1: sum(row["correct"] for row in attempts[2 * n : 2 * n + 2]) / 2 for n in range(3)
    }
    assert found["accuracy/attempts"] == right
    assert "accuracy/first_answers" not in found
    headroom = json.loads((run / "headroom.json").read_text())
    wrong = [1 - headroom["right"] / 2, *(row["probe"]["wrong"] for row in metrics)]
    assert list(found["probe/wrong"].values()) == wrong
    for name, of in (
        ("loss/match", lambda row: row["updates"][-1]["losses"]["match"]),
        ("update/total", lambda row: row["updates"][-1]["total"]),
        ("attempts/entropy", lambda row: row["attempts"]["entropy"]),
        ("attempts/mean_abs_advantage", lambda row: row["attempts"]["mean_abs_advantage"]),
        ("gate/lagging", lambda row: row["lagging"]),
    ):
        assert found[name] == pytest.approx({row["batch"] + 1: of(row) for row in metrics}), name


def test_trackio_keeps_it_on_this_machine(tmp_path, monkeypatch):
    # It looks at this when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    run = tmp_path / "run"
    run.mkdir()
    assert track(run, FIRST, batch(0), batch(1), names=["trackio"]) == []
    assert track(run, FIRST, batch(1), batch(2), names=["trackio"]) == []
    (store,) = (tmp_path / "store").rglob("*.db")
    with sqlite3.connect(store) as database:
        steps = [step for (step,) in database.execute("select step from metrics order by step")]
    assert steps == [0, 1, 2, 3]


def test_wandb_keeps_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert track(tmp_path, FIRST, batch(0), names=["wandb"]) == []
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"accuracy/final_answers" in kept.read_bytes()


def test_without_gold_no_accuracy_is_tracked():
    blind = {"correct_before": None, "correct_after": None}
    scored = reported.episode(0, **blind)
    scored["expert_feedback"]["written_score"] = 0.5
    rows = [scored, reported.episode(1, **blind), reported.alone(2, **blind)]
    _, values = values_of(BatchDone(3, 3, rows, reported.metric(0)))
    assert not any(name.startswith("accuracy") for name in values)
    assert values["expert_verdict/first_answers_good"] == 0.5
