"""`mlx-fd pareto` as a user meets it: on real runs of tiny models, and on what is no such run."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from mlx_fd import cli, runs
from mlx_fd.cli.terminal.frontier import summary
from mlx_fd.config import read
from mlx_fd.evaluation.exam import exam_questions
from mlx_fd.evaluation.pareto.exam import CHOOSING
from mlx_fd.problems.sources import truth_of
from mlx_fd.runs.checked import with_digest
from mlx_fd.runs.summary import wilson
from support.pairs import make_home
from support.shell import Done, piped

FILES = ("adapters.safetensors", "heads.safetensors", "optimizer.safetensors")
SMALL = {
    "batch_size": 1,
    "max_answer_tokens": 4,
    "max_feedback_tokens": 4,
    "max_merge_tokens": 3,
    "probe_size": 2,
    "lora_rank": 4,
    "lora_rate": 2e-2,
    "projection_rate": 2e-2,
    "checkpoint_every": 1,
    "keep_checkpoints": 50,
    "ema_decay": 0.3,
    "answers_by": "expert",
    "answer_temperature": 0.0,
    "score_at": "prompt",
    "replay": 0.0,
    "lr_schedule": "constant",
}
EPISODES = 8


def mlx_fd(*arguments):
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlx-fd", *map(str, arguments)])
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def flags(options):
    return [str(part) for name, value in options.items() for part in (_flag(name), value)]


def _flag(name):
    return "--" + name.replace("_", "-")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two tiny models and a file of problems."""
    folder = tmp_path_factory.mktemp("home")
    # In pieces the prompts give the student enough to learn for a frontier of several points.
    make_home(folder, whole=())
    return folder


def make_run(home, out, **changes):
    names = {"expert": home / "expert", "student": home / "student"}
    given = {**names, "problems": home / "problems.jsonl", "episodes": EPISODES, **SMALL}
    done = mlx_fd("loop", "--quiet", "--out", out, *flags({**given, "gate": "always", **changes}))
    assert done.status == 0, done.err
    return out


@pytest.fixture(scope="module")
def always(home):
    """A run that never stopped."""
    return make_run(home, home / "always")


@pytest.fixture(scope="module")
def found(always):
    """What the command says of it."""
    done = mlx_fd("pareto", always, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


@pytest.fixture
def copy(always, tmp_path):
    return Path(
        shutil.copytree(
            always, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns("pareto.*")
        )
    )


def metrics(run):
    return runs.read_lines(run / runs.METRICS)


def same(rows):
    """Rows without timings, and without the gate's words."""
    return json.loads(
        json.dumps(rows),
        object_hook=lambda item: {
            key: value
            for key, value in item.items()
            if "seconds" not in key and key not in ("reason", "action", "frozen")
        },
    )


def weights(run, batch):
    arrays = {}
    for name in FILES:
        loaded = mx.load(str(run / "checkpoints" / f"{batch:06d}" / name))
        arrays |= {f"{name}:{key}": np.array(value) for key, value in loaded.items()}
    return arrays


# --- what it finds ---


def test_a_point_is_what_the_run_had_come_to(always, found):
    rows = metrics(always)
    assert found["format"] == 1
    assert found["run"] == str(always)
    # Random models write no score that could be read: that loss is not known.
    assert found["objectives"] == ["expert_tokens", "lm", "hidden", "logit"]
    stops = [point["stopped_after_batch"] for point in found["points"]]
    assert len(stops) > 3
    assert stops[-1] is None and stops[:-1] == sorted(set(stops[:-1]))
    for point, stop in zip(found["points"], stops, strict=True):
        done = rows[:stop]
        updates = [update for row in done for update in row["updates"]]
        written = runs.read_lines(always / runs.EPISODES)[: len(done)]
        assert point["cost"] == {
            "expert_tokens": sum(row["tokens"]["expert_feedback"] for row in written),
            "kd_steps": len(updates),
            "teacher_tokens": sum(update["tokens"] for update in updates),
            "seconds": pytest.approx(sum(row["distil_seconds"] for row in done), abs=1e-3),
        }
        assert point["losses"] == done[-1]["probe"]
        n = len(done)
        assert point["metrics"] == {"final_accuracy": 0.0}
        low, high = wilson(0, n)
        assert point["estimates"]["final_accuracy"] == {
            "value": 0.0,
            "low": low,
            "high": high,
            "n": n,
        }
        low, high = point["thresholds"]
        assert low <= point["stop_threshold"] <= high


def test_the_frontier_and_the_choice_are_of_these_points(found):
    table = np.array(
        [
            [p["cost"]["expert_tokens"], *map(p["losses"].get, found["objectives"][1:])]
            for p in found["points"]
        ]
    )
    front = NonDominatedSorting().do(table, only_non_dominated_front=True)
    assert [not p["dominated"] for p in found["points"]] == [n in front for n in range(len(table))]
    (best,) = (p for p in found["points"] if p["recommended"])
    assert best["stop_threshold"] == found["knee"]
    products = {n: table[n, 0] * table[n, 1:].mean() for n in front}
    least = found["points"][min(products, key=products.get)]
    assert found["product_rule"] == least["stop_threshold"]
    assert 0 < found["hypervolume"] < 1.1 ** len(found["objectives"])


def test_the_files_say_the_same(always, found):
    assert json.loads((always / "pareto.json").read_text()) == with_digest(found)
    config, wanted = read(always / "pareto.toml"), read(always / "config.toml")
    assert (config.gate.gate, config.gate.trigger) == ("ema", "always")
    assert config.gate.stop_threshold == found["knee"]
    assert config.models == wanted.models and config.training == wanted.training
    assert (always / "pareto.svg").read_text().startswith("<svg")
    assert "pareto" in (always / "README.md").read_text()


def test_the_table_fits_into_a_terminal(always, found):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        done = mlx_fd("pareto", always)
    assert done.status == 0
    lines = done.out.splitlines()
    assert len([line for line in lines if line.rstrip().endswith("best")]) == 1
    rows = lines[1 : 1 + len(found["points"])]
    assert [row.split()[0] for row in rows] == [f"{p['stop_threshold']:g}" for p in found["points"]]
    assert f"stop_threshold = {found['knee']:g}" in done.out
    quiet = mlx_fd("pareto", always, "--quiet").out
    assert f"stop_threshold = {found['knee']:g}" in quiet and len(quiet) < len(done.out)
    # Of problems without right answers: it ended in an internal error.
    assert f"right: correct final answers up to there, with 95 % intervals; n = {EPISODES}" in quiet
    points = [{**point, "metrics": {}, "estimates": {}} for point in found["points"]]
    ungraded = summary({**found, "points": points})
    assert "right" not in ungraded and f"stop_threshold = {found['knee']:g}" in ungraded
    # Where every threshold stops before the end, the last stop was taken for the whole run.
    assert found["whole"] == found["points"][-1]["cost"]
    (best,) = (point for point in found["points"] if point["recommended"])
    share = best["cost"]["expert_tokens"] / found["whole"]["expert_tokens"]
    stopping = summary({**found, "points": found["points"][:-1]})
    assert f"{share:.0%} of the expert's feedback tokens of the whole run" in stopping


def test_it_needs_no_mlx(copy):
    code = "import sys; sys.modules['mlx'] = None; from mlx_fd.cli import main; main()"
    command = [sys.executable, "-c", code, "pareto", copy, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (copy / "pareto.toml").exists()


def test_costs_and_objectives_can_be_chosen(copy, found):
    options = ["--cost", "teacher_tokens", "--objectives", "lm,final_accuracy", "--json"]
    chosen = json.loads(mlx_fd("pareto", copy, *options).out)
    assert chosen["objectives"] == ["teacher_tokens", "lm", "final_accuracy"]
    losses = [point["losses"]["lm"] for point in found["points"]]
    # No answer is right, so that only the one loss decides.
    for place, point in enumerate(chosen["points"][:-1]):
        assert point["dominated"] == (min(losses[: place + 1]) < losses[place])
    failed = mlx_fd("pareto", copy, "--objectives", "lm,score")
    assert failed.status == 2 and "score is not known at every point" in failed.err


# --- it comes out as predicted ---


def test_a_run_with_the_preset_stops_where_predicted(always, found, tmp_path):
    config = tmp_path / "pareto.toml"
    shutil.copy(always / "pareto.toml", config)
    run = tmp_path / "gated"
    assert mlx_fd("loop", "--quiet", "--config", config, "--out", run).status == 0
    (best,) = (p for p in found["points"] if p["recommended"])
    stop = best["stopped_after_batch"]
    frozen = [row["frozen"] for row in metrics(run)]
    assert frozen.index(True) + 1 == stop
    assert same(metrics(run)[:stop]) == same(metrics(always)[:stop])
    episodes = [runs.read_lines(folder / runs.EPISODES)[:stop] for folder in (run, always)]
    assert same(episodes[0]) == same(episodes[1])
    one, other = weights(run, stop), weights(always, stop)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("objectives", "says"),
    [("lm,lm", "'lm' is there twice"), (",", "names nothing"), ("", "names nothing")],
)
def test_objectives_are_named_once_and_at_least_one(objectives, says, always):
    """A loss that was there twice counted twice in the hypervolume, and none meant all."""
    done = mlx_fd("pareto", always, "--objectives", objectives)
    assert done.status == 2 and says in done.err, done


def test_a_sweep_tries_every_threshold_and_goes_on_where_it_stopped(home, tmp_path):
    # Each of its runs is a process of its own.
    copy = make_run(home, tmp_path / "run", episodes=6)
    chosen = ["--cost", "kd_steps", "--objectives", "lm,logit"]
    first, second = (copy / "sweep" / f"stop-{p['stop_threshold']:g}" for p in _points(copy)[:2])
    # What lies where the command is called is not imported.
    (tmp_path / "numpy.py").write_text("raise SystemExit('not NumPy')")
    with piped("pareto", "--sweep", *chosen, copy, cwd=tmp_path) as begun:
        deadline = time.monotonic() + 100
        while not metrics(second) and begun.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        begun.send(signal.SIGINT)
        done = begun.rest()
    assert done.status == 130, done
    assert f"mlx-fd pareto --sweep {' '.join(chosen)} {copy}" in done.err
    assert (first / "summary.json").exists() and not (second / "summary.json").exists()
    before = (first / "summary.json").stat().st_mtime_ns

    done = mlx_fd("pareto", copy, "--sweep", "--json")
    assert done.status == 0, done.err
    points = json.loads(done.out)["points"]
    assert (first / "summary.json").stat().st_mtime_ns == before
    assert json.loads((copy / "pareto.json").read_text())["points"] == points
    for point in points:
        real = point["real"]
        assert real["as_predicted"]
        assert real["stopped_after_batch"] == point["stopped_after_batch"]
        assert real["kd_steps"] == point["cost"]["kd_steps"]
        assert real["final_accuracy"]["n"] == 6
        options = tomllib.loads((copy / real["run"] / "config.toml").read_text())
        assert options["gate"]["stop_threshold"] == point["stop_threshold"]
    assert "not as predicted" not in mlx_fd("pareto", copy, "--sweep").out

    # A prediction that is wrong is seen.
    shutil.rmtree(second)
    shutil.copytree(first, second, symlinks=True)
    failed = mlx_fd("pareto", copy, "--sweep")
    assert failed.status == 2 and "another configuration" in failed.err


def _points(run):
    mlx_fd("pareto", run)
    return json.loads((run / "pareto.json").read_text())["points"]


def test_the_student_is_examined_where_its_checkpoint_is(tmp_path):
    run = tmp_path / "run"
    options = {
        "episodes": 7,
        "batch_size": 1,
        "probe_size": 2,
        "exam_size": 2,
        "max_answer_tokens": 16,
        "max_feedback_tokens": 16,
        "max_merge_tokens": 8,
        "losses": "hidden",
        "kd_steps": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": 50,
        "ema_decay": 0.3,
        "minimum_gain": 0.0,
    }
    fixed = ("--preset", "tiny", "--no-solutions", "--gate", "always")
    done = mlx_fd("loop", *fixed, "--out", run, *flags(options))
    assert done.status == 0, done.err
    found = json.loads(mlx_fd("pareto", run, "--exam", "--json").out)
    assert found["objectives"][-2:] == ["first_error_f1", "solved"]
    last = found["points"][-1]["estimates"]
    assert [last[name]["n"] for name in ("first_error_f1", "solved")] == [2, 2]
    # Chosen by other questions than those that are reported.
    config = read(run / "config.toml")
    chosen, reported = (
        {question.problem.question for question in exam_questions(config, split)}
        for split in (CHOOSING, "test")
    )
    assert len(chosen) == 2 and not chosen & reported
    assert exam_questions(config) == truth_of("arithmetic").questions(2, 0, "test")

    stop = found["points"][0]["stopped_after_batch"]
    assert stop is not None
    shutil.rmtree(run / "checkpoints" / f"{stop:06d}")
    found = json.loads(mlx_fd("pareto", run, "--exam", "--json").out)
    assert "solved" not in found["objectives"]
    assert (
        "solved" not in found["points"][0]["metrics"] and "solved" in found["points"][-1]["metrics"]
    )
    assert any(f"no checkpoint after batch {stop}" in note for note in found["notes"])


# --- what is no such run ---


def refused(run, *texts):
    done = mlx_fd("pareto", run)
    assert done.status == 2, done
    assert done.out == "" and "a bug in mlx-fd" not in done.err and "Traceback" not in done.err
    for text in texts:
        assert text in done.err
    assert not (run / "pareto.json").exists()


def test_runs_that_cannot_be_replayed(home, tmp_path):
    refused(tmp_path / "nothing", "this is not a run directory")
    gated = make_run(home, tmp_path / "a run", gate="ema", episodes=2)
    refused(
        gated,
        "this run's gate was ema",
        f"mlx-fd loop --config '{gated}/config.toml' --gate always --out '{gated}-always'",
    )
    refused(make_run(home, tmp_path / "short", episodes=4), "4 probe evaluations are too few", "5")
    still = {"lora_rate": 0, "score_rate": 0, "projection_rate": 0}
    refused(make_run(home, tmp_path / "flat", **still), "no stop_threshold would have stopped")


def test_a_run_that_has_not_ended(copy):
    (copy / "summary.json").unlink()
    found = json.loads(mlx_fd("pareto", copy, "--json").out)
    assert not found["finished"] and any("has not ended" in note for note in found["notes"])
    shutil.rmtree(copy / "checkpoints")
    (copy / "pareto.json").unlink()
    refused(copy, "has not come to its first checkpoint", "mlx-fd resume")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"batch": 3,', '{"batch": 3'),  # a line that is not JSON
        ('{"batch": 3,', '{"batch": 4,'),
        ('"distil_seconds"', '"seconds_of_old"'),
        ('"tokens": ', '"tokens": "many", "more": '),
        ('"probe": {"lm": ', '"probe": {"lm": NaN, "x": '),
        ('"probe": {"lm": ', '"probe": {"lm": "low", "x": '),
        ('"updates": [', '"updates": [], "others": ['),
        ('"probe": {', '"probe": 7, "other": {'),
    ],
)
def test_harmed_rows_are_explained(old, new, copy):
    file = copy / "metrics.jsonl"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    refused(copy, "make a new run: mlx-fd loop --config")


def test_lost_lines_and_harmed_totals_are_explained(copy):
    file = copy / "metrics.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    refused(copy, "missing or damaged")
    file.write_text(whole)
    episodes = (copy / "episodes.jsonl").read_text()
    (copy / "episodes.jsonl").write_text("")
    refused(copy, "missing or damaged")
    (copy / "episodes.jsonl").write_text(episodes)
    for content in ("{", "[]", '{"probe": {"before": {}, "after": null}, "updates": {"steps": 1}}'):
        (copy / "summary.json").write_text(content)
        refused(copy, "make a new run")


def test_no_examination_without_questions(copy):
    done = mlx_fd("pareto", copy, "--exam")
    assert done.status == 2 and "has no examination" in done.err
