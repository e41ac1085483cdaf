"""What is not ours is left alone: a mark says whose a folder is, and no name of a file does."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mlx_fd import cli, runs
from mlx_fd.errors import UserError
from mlx_fd.runs import marks
from support.pairs import make_home
from support.shell import Done, limit_file_size, shell
from support.trained import make_run

SMALL = shlex.split(
    "--episodes 8 --batch-size 1 --max-answer-tokens 4 --max-feedback-tokens 4 "
    "--max-merge-tokens 3 "
    "--answers-by expert --answer-temperature 0 --score-at prompt --replay 0 "
    "--lr-schedule constant "
    "--probe-size 2 --lora-rank 4 --lora-rate 2e-2 --projection-rate 2e-2 --ema-decay 0.3 "
    "--checkpoint-every 1"
)
SMALL_EVAL = ["--problems", "arithmetic", "--limit", "1", "--quiet"]


@pytest.fixture
def mlx_fd(monkeypatch, capsys):
    """Run a command in this process; its status and all that it printed, on one line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-fd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, " ".join((out + err).split())

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    make_home(folder, whole=())  # of which a sweep has several points
    named = [("--expert", "expert"), ("--student", "student"), ("--problems", "problems.jsonl")]
    return [word for flag, name in named for word in (flag, str(folder / name))]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """A run that is done; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = (*SMALL, "--gate", "always", "--quiet")
    done = shell("loop", *models, *options, "--out", folder, cwd=folder.parent)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it with a batch more to do."""
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    config = (folder / runs.CONFIG).read_text()
    (folder / runs.CONFIG).write_text(config.replace("episodes = 8", "episodes = 9"))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def project(folder: Path) -> dict[str, bytes | None]:
    """A folder of the user's, full of names that are ours too; what is in it."""
    (folder / "checkpoints" / ".cache").mkdir(parents=True)
    (folder / "checkpoints" / ".cache" / "x").write_text("w")
    for name in ("README.md", "config.toml", "outputs.jsonl", "eval.json", "manifest.json"):
        (folder / name).write_text(f"my {name}\n")
    for name in ("compare", "advantage"):
        (folder / f"{name}.html").write_text("<p>mine</p>")
        (folder / f"{name}.json").write_text("{}")
    (folder / "manifest.json").write_text('{"versions": {"numpy": "2"}, "options": {}}')
    return contents(folder)


@pytest.mark.parametrize(
    "command",
    [
        ["loop", "--preset", "tiny"],
        ["self-distill", "--method", "step-critique", "--critic", "truth"],
        ["eval", "tiny-student", *SMALL_EVAL],
        ["advantage", "tiny-base", "--limit", "1", "--samples", "2"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_of_the_users_is_left_alone(command, mlx_fd, tmp_path):
    before = project(tmp_path / "proj")
    status, said = mlx_fd(*command, "--out", tmp_path / "proj")
    assert status == 2 and "choose another --out" in said and "(.mlx-fd)" in said, said
    assert contents(tmp_path / "proj") == before


def test_a_run_begun_by_names_alone_is_none(mlx_fd, tmp_path):
    """Only what a killed run of an earlier version may have left: it may be anybody's."""
    folder = tmp_path / "proj"
    (folder / "checkpoints" / ".cache").mkdir(parents=True)
    (folder / "README.md").write_text("my notes of a month")
    (folder / "config.toml").write_text("my = 'settings'")
    before = contents(folder)
    status, said = mlx_fd("loop", "--preset", "tiny", "--out", folder)
    assert status == 2 and "no mark of mlx-fd" in said
    assert contents(folder) == before


def test_commands_on_a_run_write_only_into_a_run(mlx_fd, tmp_path):
    before = project(tmp_path / "proj")
    for command in ("report", "pareto", "resume", "advantage", "eval"):
        status, said = mlx_fd(command, tmp_path / "proj")
        assert status == 2, said
        assert contents(tmp_path / "proj") == before
    status, said = mlx_fd("report", tmp_path / "proj", "--out", tmp_path / "page.html")
    assert status == 2 and "version" in said, said
    assert contents(tmp_path / "proj") == before


def test_compare_leaves_a_folder_of_the_users_alone(mlx_fd, tmp_path, models):
    run = make_run(tmp_path / "run", models[3])
    assert mlx_fd("export", run, "--out", tmp_path / "x", "--parity-problems", 1)[0] == 0
    before = project(tmp_path / "proj")
    command = ["compare", tmp_path / "x", "--engine", "mlx", "--limit", 1, "--quiet", "--out"]
    status, said = mlx_fd(*command, tmp_path / "proj")
    assert status == 2 and "choose another --out" in said
    assert contents(tmp_path / "proj") == before
    for _ in range(2):  # the second time over its own
        status, said = mlx_fd(*command, tmp_path / "cmp")
        assert status == 0, said
    assert names(tmp_path / "cmp") == [".mlx-fd", "compare.html", "compare.json"]


def test_what_a_folder_holds_is_not_mixed(run, mlx_fd):
    status, said = mlx_fd("eval", run, *SMALL_EVAL, "--out", run)
    assert status == 2 and "holds a run, and an evaluation is not written into it" in said
    status, said = mlx_fd("loop", "--preset", "tiny", "--out", run)
    assert status == 2 and "mlx-fd resume" in said


def test_a_sweep_does_not_begin_beside_something_else(run, mlx_fd):
    status, said = mlx_fd("pareto", run, "--quiet")
    assert status == 0, said
    point = json.loads((run / "pareto.json").read_text())["points"][-1]
    theirs = run / "sweep" / f"stop-{point['stop_threshold']:.16g}"
    theirs.mkdir(parents=True)
    (theirs / "summary.json").write_text("{}")
    status, said = mlx_fd("pareto", run, "--sweep", "--quiet")
    assert status == 2 and "move it away" in said
    assert contents(run / "sweep") == {theirs.name: None, f"{theirs.name}/summary.json": b"{}"}
    # A run's, without what says which run it was: its summary may be that of other options.
    marks.write_mark(theirs, marks.RUN)
    status, said = mlx_fd("pareto", run, "--sweep", "--quiet")
    assert status == 2 and "work of an earlier run in it (summary.json)" in said
    assert "or move it away" in said


def test_a_run_of_an_earlier_version_is_one(run, mlx_fd):
    """It has no mark; its manifest says what it is, and resume marks it."""
    (run / marks.MARK).unlink()
    assert mlx_fd("report", run)[0] == 0
    assert mlx_fd("pareto", run, "--quiet")[0] == 0
    assert mlx_fd("eval", run, *SMALL_EVAL)[0] == 0
    assert runs.is_ours(run) and not (run / marks.MARK).exists()
    status, said = mlx_fd("resume", run, "--quiet")
    assert status == 0, said
    assert marks.read_mark(run) == {"kind": "run", "format": 1}


def test_the_mark_is_there_before_anything_else(tmp_path):
    for number, left in enumerate((b"", b'{"kind": "run", "format": 1}\n')):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / marks.MARK).write_bytes(left)  # all that a kill can leave
        runs.create(folder, "", {})
        assert marks.read_mark(folder)["kind"] == "run"
    for mark in (b"{", b"[]", b'{"kind": "other", "format": 1}', b'{"kind": "run", "format": 2}'):
        (folder / marks.MARK).write_bytes(mark)
        (folder / runs.MANIFEST).unlink(missing_ok=True)
        with pytest.raises(UserError, match="no mark of mlx-fd"):
            runs.create(folder, "", {})
    # A link to a mark marks nothing.
    (folder / marks.MARK).unlink()
    (folder / marks.MARK).symlink_to("../0/.mlx-fd")
    with pytest.raises(UserError, match="no mark of mlx-fd"):
        runs.create(folder, "", {})


def test_two_evaluations_do_not_write_one_folder(mlx_fd, tmp_path):
    with marks.claimed(tmp_path / "out", marks.EVALUATION):
        status, said = mlx_fd("eval", "tiny-student", *SMALL_EVAL, "--out", tmp_path / "out")
    assert status == 2 and "another mlx-fd process is writing into this folder" in said
    assert names(tmp_path / "out") == [".mlx-fd"]


# -------------------------------------------------------------------------------------------- links

# Everything that is replaced as a whole by a command on a run, and what an earlier version called
# it before it was renamed.
REPLACED = (
    *("manifest.json", "summary.json", "probe.json", "probe.safetensors", "tracking.json"),
    *("exam_before.json", "exam_after.json", "report.html", "pareto.json", "pareto.toml"),
    *("pareto.svg", "README.md", "eval/fast/outputs.jsonl", "eval/fast/eval.json"),
    *("advantage/advantage.json", "advantage/advantage.html", "checkpoints/last"),
    "checkpoints/best",
)


def test_nothing_is_written_through_a_planted_link(run, mlx_fd, tmp_path):
    """Where a file is replaced, its link is, and what the link leads to stays as it was."""
    victims = tmp_path / "victims"
    for name in ("eval/fast", "advantage"):
        (run / name).mkdir(parents=True)
    for name, kind in (("eval/fast", marks.EVALUATION), ("advantage", marks.ADVANTAGE)):
        marks.write_mark(run / name, kind)
    for name in REPLACED:
        path, victim = run / name, victims / name
        victim.parent.mkdir(parents=True, exist_ok=True)
        old = path.with_name(f".{path.name}.tmp")
        if "checkpoints" not in name:
            # What is read of the run stays readable; what a command makes is somebody's.
            kept = path.is_file() and name not in {"report.html", "summary.json"}
            victim.write_bytes(path.read_bytes() if kept else b"<p>precious</p>")
            path.unlink(missing_ok=True)
            if name not in {"report.html", "eval/fast/eval.json"}:
                path.symlink_to(victim)
        (victims / f"{name}.old").write_text("precious")
        old.symlink_to(victims / f"{name}.old")
    before = contents(victims)
    for command in (
        ["resume", run, "--quiet"],
        ["pareto", run, "--quiet"],
        ["report", run],
        ["eval", run, *SMALL_EVAL],
        ["advantage", run, "--limit", "2", "--samples", "2", "--max-answer-tokens", "4", "--quiet",
         "--contexts", "reference"],
    ):  # fmt: skip
        status, said = mlx_fd(*command)
        assert status == 0, said
        assert contents(victims) == before, command
    made = ("summary.json", "report.html", "eval/fast/eval.json", "advantage/advantage.html")
    for name in (*made, "pareto.json", "pareto.toml", "pareto.svg", "manifest.json"):
        assert (run / name).is_file() and not (run / name).is_symlink(), name


def test_a_report_that_is_a_link_to_something_else_is_left_alone(run, mlx_fd, tmp_path):
    (tmp_path / "mine.html").write_text("<p>precious</p>")
    (run / "report.html").symlink_to("../mine.html")
    status, said = mlx_fd("report", run)
    assert status == 2 and "no page of mlx-fd" in said
    assert (tmp_path / "mine.html").read_text() == "<p>precious</p>"


@pytest.mark.parametrize("name", [runs.EPISODES, runs.METRICS, runs.SAMPLES, ".lock"])
@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_grows_in_place_is_an_ordinary_file(name, what, run, mlx_fd, tmp_path):
    victim = tmp_path / "victim"
    path = run / name
    victim.write_bytes(path.read_bytes() if path.exists() else b"precious")
    before = victim.read_bytes()
    path.unlink(missing_ok=True)
    path.symlink_to(victim) if what == "link" else os.mkfifo(path)
    status, said = mlx_fd("resume", run, "--quiet")
    assert status == 2 and name in said, said
    assert "not a regular file" in said or "has lost lines" in said
    assert victim.read_bytes() == before
    if name != ".lock" and what == "pipe":
        status, said = mlx_fd("report", run)
        assert status == 0, said


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("checkpoints", ["resume", "--quiet"]),
        ("teacher", ["resume", "--quiet"]),
        ("eval", ["eval", *SMALL_EVAL]),
        ("eval/fast", ["eval", *SMALL_EVAL]),
        ("sweep", ["pareto", "--sweep", "--quiet"]),
        ("advantage", ["advantage"]),
    ],
)
def test_a_folder_of_a_run_does_not_lead_out_of_it(name, command, run, mlx_fd, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    if (run / name).is_dir():
        (run / name).rename(elsewhere)
    else:
        elsewhere.mkdir()
        (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(elsewhere)
    before = contents(elsewhere)
    status, said = mlx_fd(command[0], run, *command[1:])
    assert status == 2 and f"{run / name}: this is a link" in said, said
    assert contents(elsewhere) == before


# --------------------------------------------------------------------------------------- left-overs

KILLED = {
    "export": (
        "from mlx_fd.export.exporter import Form, export\n"
        "die = lambda step, done, total: step == 'comparing' and os.kill(os.getpid(), 9)\n"
        "export(sys.argv[1], Path(sys.argv[2]), Form(), progress=die)\n"
    ),
    "conversion": (
        "from mlx_fd.models import gguf\n"
        "gguf.write_tokenizer = lambda *_: os.kill(os.getpid(), 9)\n"
        "gguf.convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    ),
}


@pytest.mark.parametrize("what", KILLED)
def test_what_a_kill_leaves_is_cleared_by_the_next_run(what, models, mlx_fd, tmp_path):
    from mlx_fd.models.gguf import convert
    from mlx_fd.models.storage import new_directory

    source: Path = make_run(tmp_path / "run", models[3])
    if what == "conversion":
        made = ("export", source, "--format", "gguf", "--gguf-type", "f32", "--no-parity")
        status, said = mlx_fd(*made, "--out", tmp_path / "gguf")
        assert status == 0, said
        (source,) = (tmp_path / "gguf").glob("*.gguf")
    place = tmp_path / "place"
    code = f"import os, sys\nfrom pathlib import Path\n{KILLED[what]}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(place / "out")], check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = place.iterdir()
    assert left.name.startswith(".tmp-") and left.is_dir()
    with new_directory(place / "another") as working:
        if what == "export":
            status, said = mlx_fd("export", source, "--no-parity", "--out", place / "out")
            assert status == 0, said
        else:
            convert(source, place / "out")
        assert working.is_dir() and not left.exists()
    assert names(place) == ["another", "out"]


def test_an_archive_on_a_full_disk(models, tmp_path):
    """Neither the directory nor the archive is there, and the same command makes both."""
    run = make_run(tmp_path / "run", models[3])
    there = tmp_path / "there"
    there.mkdir()

    def export(limit: int) -> Done:
        command = ("export", run, "--out", "x", "--archive", "--no-parity")
        return shell(*command, cwd=there, before=partial(limit_file_size, limit))

    assert export(1 << 30).status == 0
    whole = (there / "x.tar").read_bytes()
    largest = max(path.stat().st_size for path in (there / "x").iterdir())
    assert largest + 4096 < len(whole)
    shutil.rmtree(there / "x")
    (there / "x.tar").unlink()
    failed = export(largest + 4096)
    assert failed.status == 2 and failed.out == ""
    assert f"{there / 'x.tar'}: cannot be written" in failed.err
    assert "nothing of this export was left behind" in failed.err
    assert list(there.iterdir()) == []
    assert export(1 << 30).status == 0
    assert (there / "x.tar").read_bytes() == whole and (there / "x").is_dir()


@pytest.mark.parametrize(("umask", "modes"), [(0o077, {0o600, 0o700}), (0o022, {0o644, 0o755})])
def test_what_commands_write_has_the_permissions_of_the_umask(umask, modes, models, tmp_path):
    commands = (
        ["loop", *models, *SMALL, "--episodes", 2, "--quiet", "--out", "run"],
        ["report", "run"],
        ["eval", "run", *SMALL_EVAL],
        ["export", "run", "--archive", "--parity-problems", "1", "--out", "x", "--quiet"],
    )
    # What comes of a temporary file would be too narrow, and what copies modes too wide.
    for command in commands if umask == 0o022 else commands[:2]:
        done = shell(*command, cwd=tmp_path, before=partial(os.umask, umask))
        assert done.status == 0, done.err
    for path in tmp_path.rglob("*"):
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) in modes, path
