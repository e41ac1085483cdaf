"""Every file of a stopped run, damaged in every way: noticed, harmless or refused; never silent."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd import cli, runs
from mlx_fd.config import Config, override, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.evaluation.exam import exam_questions
from mlx_fd.evaluation.pareto.curve import read_curve
from mlx_fd.export.source import open_source
from mlx_fd.feedback import pair
from mlx_fd.files import write_json
from mlx_fd.report.reading import read_runs
from mlx_fd.runs.checked import read_checked, with_digest
from mlx_fd.runs.events import Event, Warned
from mlx_fd.runs.plan import make_plan
from mlx_fd.training.job import Job
from mlx_fd.training.loop import run
from mlx_fd.training.selfdistill import plan as self_session
from mlx_fd.training.selfdistill import training
from mlx_fd.training.selfdistill.methods import configured
from support.draws import ALL, by_day
from support.pairs import MEASURED, make_dirs, without_seconds

OPTIONS = {
    "problems": "arithmetic",
    "batch_size": 2,
    "max_answer_tokens": 6,
    "max_feedback_tokens": 6,
    "max_merge_tokens": 4,
    "probe_size": 2,
    "exam_size": 2,
    "episodes": 6,
    # Texts and what the expert said of them are read back in the second epoch.
    "epochs": 2,
    "teacher_top_k": 4,
    "gate": "always",
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "kd_steps": 1,
    "lora_rank": 2,
    "lora_rate": 1e-2,
}
STOPPED_AFTER = 5


def make_stopped(folder: Path, **changes) -> Path:
    """A run that was stopped in its second epoch."""
    expert, student = make_dirs(folder, layers=(2, 1))
    options = {**OPTIONS, "expert": str(expert), "student": str(student), **changes}
    target, asked = folder / "stopped", iter(range(STOPPED_AFTER + 1))
    go_on(target, options, lambda: next(asked) == STOPPED_AFTER)
    return target


def go_on(folder: Path, options: dict, stop: Callable[[], bool] = lambda: False) -> set[str]:
    """Begin a run or go on with it, without the command; what it warned of."""
    warned: set[str] = set()

    def report(event: Event) -> None:
        if isinstance(event, Warned):
            warned.add(event.text)

    plan = make_plan(override(Config(), options, "test"))
    with runs.locked(folder):
        if not runs.is_run(folder):
            runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, report, stop)
        run(job, pair.open_pair(plan), exam_questions(plan.config))
    return warned


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped, not to be written to; what comes of it if nothing is damaged."""

    folder: Path
    comes_to: dict[str, object]
    warned: set[str]

    def noticed(self, said: str) -> list[str]:
        """What is said of a damage: warnings and notes that there are none of without one."""
        return [
            line
            for line in said.splitlines()
            if ("warning: " in line or "no digest" in line)
            and not any(text in line for text in self.warned)
        ]


def _stopped(folder: Path, **changes) -> Stopped:
    target = make_stopped(folder, **changes)
    whole = copy_of(target, folder / "whole")
    warned = go_on(whole, options_of(whole))
    return Stopped(target, outcome(whole), warned)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    return _stopped(tmp_path_factory.mktemp("damage"), exam_size=0)


@pytest.fixture(scope="module")
def examined(tmp_path_factory) -> Stopped:
    """With an examination, whose many intervals take most of a small run's time."""
    return _stopped(tmp_path_factory.mktemp("examined"))


@pytest.fixture
def resume(monkeypatch, capsys):
    """The command in this process: its exit status and all that it said."""

    def call(folder: Path, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-fd", "resume", str(folder), *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "defect" not in err, err
        return ended.value.code, out + err

    return call


def options_of(folder: Path) -> dict:
    """With which a run was begun."""
    return json.loads((folder / runs.MANIFEST).read_text())["options"]


def copy_of(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to, symlinks=True)


def outcome(folder: Path) -> dict[str, object]:
    """All that came of a run, but for how long it took and how much memory."""
    found: dict[str, object] = {
        name: without_seconds(runs.read_lines(folder / name)) for name in runs.LOGS
    }
    for which in ("last", "best"):
        checkpoint = (folder / runs.CHECKPOINTS / which).resolve()
        found[which] = checkpoint.name
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                arrays = mx.load(str(path)).items()
                found[f"{which}/{path.name}"] = {k: np.array(v).tobytes() for k, v in arrays}
            elif path.name != runs.STATE:
                found[f"{which}/{path.name}"] = path.read_bytes()
    state = json.loads((folder / runs.CHECKPOINTS / "last" / runs.STATE).read_text())
    found["state"] = {name: value for name, value in state.items() if name not in MEASURED}
    for name in (runs.SUMMARY, runs.EXAM, runs.EXAM_AFTER, runs.PROBE, runs.HEADROOM):
        if not (folder / name).exists():
            continue
        value, _ = read_checked(folder / name)
        if isinstance(value, list):  # an examination's, of an older version
            value = {"results": value}
        measured = ("seconds", *MEASURED)
        found[name] = {key: item for key, item in value.items() if key not in measured}
    # Two bytes may mean the same to a TOML parser; what they mean is what matters.
    found[runs.CONFIG] = tomllib.loads((folder / runs.CONFIG).read_text())
    return found


# --- ways to damage a file ---


def other_digit(place: float) -> Callable[[bytes], bytes]:
    """Another digit in the place of one, at this share of all the digits."""

    def change(data: bytes) -> bytes:
        digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
        at = digits[int(place * len(digits))]
        return data[:at] + bytes([48 + (data[at] - 47) % 10]) + data[at + 1 :]

    return change


def without_brace(data: bytes) -> bytes:
    at = max(data.rfind(b"}"), data.rfind(b"]"))
    return data[:at] + data[at + 1 :]


def without_line(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    del lines[len(lines) // 2]
    return b"".join(lines)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def gone(data: bytes) -> None:
    return None


TEXT = {
    **{f"digit {place:.0%}": other_digit(place) for place in (0.1, 0.5, 0.9)},
    "brace": without_brace,
    "line": without_line,
    "half": half,
    "gone": gone,
}
BINARY = {"bit": flipped, "half": half, "gone": gone}
# By day, but for configurations, whose options may each be changed, and logs, which are read line
# by line: of any other file one digest covers all.
BY_DAY = ("digit 50%", "line", "gone", "bit")
FILES = (
    *(runs.CONFIG, runs.MANIFEST, runs.EPISODES, runs.METRICS, runs.SAMPLES),
    *(runs.PROBE, "probe.safetensors", runs.EXAM, "teacher/*.safetensors"),
    *(f"checkpoints/000005/{name}" for name in ("state.json", "adapter_config.json")),
    *(f"checkpoints/000005/{name}.safetensors" for name in ("adapters", "heads", "optimizer")),
    *(f"checkpoints/{link}" for link in ("last", "best")),
    "checkpoints/000004/state.json",
    "checkpoints/000004/adapters.safetensors",
)
CASES = [
    (name, way)
    for name in FILES
    for way in (
        ("gone",)
        if name.endswith(("/last", "/best"))
        else BINARY
        if name.endswith(".safetensors")
        else TEXT
    )
    if ALL or way in BY_DAY or name in (runs.CONFIG, *runs.LOGS)
]


def damage(folder: Path, name: str, way: str) -> None:
    found = sorted(folder.glob(name))
    if name.startswith("teacher/"):  # named by what they hold: which of them are read again differs
        for path in found:
            damage_file(path, name, way)
        return
    damage_file(random.Random(0).choice(found), name, way)


def damage_file(path: Path, name: str, way: str) -> None:
    if path.is_symlink():
        path.unlink()
        return
    if name.endswith("adapter_config.json"):
        # Where the base model is may be changed, and digits of its path with it.
        path.write_text(re.sub('"model": ".*"', '"model": "base"', path.read_text()))
    data = (BINARY if name.endswith(".safetensors") else TEXT)[way](path.read_bytes())
    assert data != path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(("name", "way"), by_day(CASES))
def test_a_damaged_file_of_a_stopped_run(name, way, request, resume, tmp_path):
    one = request.getfixturevalue("examined" if name == runs.EXAM else "stopped")
    folder = copy_of(one.folder, tmp_path / "run")
    damage(folder, name, way)
    before = files_of(folder)
    status, said = resume(folder)
    noticed = one.noticed(said)
    if status == 2:
        assert files_of(folder) == before, "refused, and changed"
        assert "error: " in said
        return
    assert status == 0, said
    came = outcome(folder)
    if name == runs.CONFIG:
        # An option that may be changed; and it is said that it was. A line may say no more than
        # what is so without it.
        del came[runs.CONFIG]
        changed = read(folder / runs.CONFIG) != read(one.folder / runs.CONFIG)
        assert not changed or any(f"{runs.CONFIG} was changed" in text for text in noticed)
    for part, value in one.comes_to.items():
        assert part == runs.CONFIG or came[part] == value, (part, noticed)
    # What an older checkpoint holds is not looked at; what the expert read it can read again.
    unseen = (runs.CONFIG, "checkpoints/000004", "checkpoints/last", "checkpoints/best")
    assert noticed or name.startswith(unseen) or (name, way) == ("teacher/*.safetensors", "gone")
    # What was cut is kept.
    if way != "gone" and any(name == log for log in runs.LOGS):
        assert list((folder / runs.CUT).iterdir())


# --- finished runs ---


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory) -> Path:
    """A run that is done; not to be written to."""
    folder = copy_of(stopped.folder, tmp_path_factory.mktemp("finished") / "run")
    go_on(folder, options_of(folder))
    return folder


def test_a_finished_run_is_left_as_it_is(finished, stopped, resume, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    before = files_of(folder)
    status, said = resume(folder)
    assert status == 0 and "nothing left to do" in said and not stopped.noticed(said)
    assert files_of(folder) == before


@pytest.mark.parametrize("lost", ["all", "folders", "newest", "damaged"])
def test_a_finished_run_whose_checkpoints_are_gone_keeps_what_it_has(
    lost, finished, stopped, resume, tmp_path
):
    folder = copy_of(finished, tmp_path / "run")
    if lost == "all":
        shutil.rmtree(folder / runs.CHECKPOINTS)
    elif lost == "damaged":
        damage(folder, "checkpoints/000006/adapters.safetensors", "bit")
    else:
        for path in (folder / runs.CHECKPOINTS).iterdir():
            if not path.is_symlink() and (lost == "folders" or path.name == "000006"):
                shutil.rmtree(path)
    before = files_of(folder)
    status, said = resume(folder)
    assert status == 2 and files_of(folder) == before
    assert "Nothing was changed." in said and "--redo-from-checkpoint" in said
    assert "the run is finished" in said and "6 batches" in said
    # What is asked for comes to the same, and what was cut is kept.
    status, said = resume(folder, "--redo-from-checkpoint")
    assert status == 0, said
    came = outcome(folder)
    assert {part for part, value in stopped.comes_to.items() if came[part] != value} == set()
    [cut] = (folder / runs.CUT).iterdir()
    assert (cut / runs.SUMMARY).read_bytes() == before[runs.SUMMARY]
    if lost in ("all", "folders"):
        assert (cut / runs.METRICS).read_bytes() == before[runs.METRICS]
    if lost == "damaged":
        name = "checkpoints/000006/adapters.safetensors"
        assert (cut / "000006" / "adapters.safetensors").read_bytes() == before[name]


@pytest.mark.parametrize("way", TEXT if ALL else BY_DAY[:3])
def test_a_damaged_summary_is_made_again(way, finished, stopped, resume, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    summary = outcome(folder)[runs.SUMMARY]
    damage(folder, runs.SUMMARY, way)
    status, said = resume(folder)
    assert status == 0
    assert outcome(folder)[runs.SUMMARY] == summary
    assert way == "gone" or any(runs.SUMMARY in text for text in stopped.noticed(said))


def test_run_and_models_may_move(stopped, resume, tmp_path):
    """What a run is does not depend on where it is."""
    target = copy_of(stopped.folder, tmp_path / "moved here")
    config = target / runs.CONFIG
    expert = Path(options_of(target)["expert"])
    moved = copy_of(expert, tmp_path / "moved expert")
    gone = tmp_path / "gone"
    config.write_text(config.read_text().replace(f'"{expert}"', f'"{gone}"'))
    before = outcome(target)
    status, said = resume(target)
    assert status == 2 and f"its expert, {gone}, does not exist" in said and str(config) in said
    assert outcome(target) == before
    config.write_text(config.read_text().replace(f'"{gone}"', f'"{moved}"'))
    assert resume(target)[0] == 0
    found = outcome(target)
    config.write_text(config.read_text().replace(f'"{moved}"', f'"{expert}"'))
    assert {**found, runs.CONFIG: outcome(target)[runs.CONFIG]} == stopped.comes_to


def test_a_copy_that_followed_links_goes_on_the_same(stopped, resume, tmp_path):
    """As `scp -r` makes one: what were links to the last and the best checkpoint are folders."""
    target = shutil.copytree(stopped.folder, tmp_path / "run")
    assert not (target / runs.CHECKPOINTS / "last").is_symlink()
    status, said = resume(target)
    assert status == 0, said
    assert all(f"checkpoints/{name} was a folder" in said for name in ("last", "best"))
    assert outcome(target) == stopped.comes_to
    [cut] = (path for path in (target / runs.CUT).iterdir() if path.name != "tail")
    assert sorted(path.name for path in cut.iterdir()) == ["best", "last"]


def test_a_run_that_is_made_longer_keeps_its_first_summary(finished, resume, tmp_path):
    """Of one epoch: with more, all that was done depends on how many episodes there are."""
    folder = make_stopped(
        tmp_path, exam_size=0, epochs=1, teacher_top_k=0, episodes=4, lr_schedule="constant"
    )
    assert resume(folder)[0] == 0
    first = (folder / runs.SUMMARY).read_bytes()
    config = (folder / runs.CONFIG).read_text()
    (folder / runs.CONFIG).write_text(config.replace("episodes = 4", "episodes = 6"))
    status, said = resume(folder)
    assert status == 0 and "episodes was 4, is 6" in said
    assert json.loads((folder / runs.SUMMARY).read_text())["episodes"] == 6
    [cut] = (folder / runs.CUT).iterdir()
    assert (cut / runs.SUMMARY).read_bytes() == first


# --- who else reads a run ---


def test_the_report_says_which_files_are_not_what_the_run_wrote(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    [whole] = read_runs([folder])
    assert not [text for text in whole.missing if "not what the run wrote" in text]
    summary, _ = read_checked(folder / runs.SUMMARY)
    assert whole.totals["seconds"] == summary["seconds"]
    damage(folder, runs.METRICS, "digit 50%")
    damage(folder, runs.SUMMARY, "digit 50%")
    [harmed] = read_runs([folder])
    assert any(text.startswith(f"{runs.METRICS} is not what") for text in harmed.missing)
    assert any(text.startswith(f"{runs.SUMMARY} is damaged") for text in harmed.missing)


def test_a_frontier_and_a_model_card_are_not_made_of_changed_files(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    assert read_curve(folder).finished and open_source(str(folder)).summary
    damage(folder, runs.SUMMARY, "digit 90%")
    with pytest.raises(UserError, match=r"it was changed after it was written.*resume"):
        open_source(str(folder))
    with pytest.raises(UserError, match="it was changed after it was written"):
        read_curve(folder)
    folder = copy_of(finished, tmp_path / "run")
    damage(folder, runs.METRICS, "digit 90%")
    with pytest.raises(UserError, match=r"metrics\.jsonl .*are missing or damaged"):
        read_curve(folder)
    folder = copy_of(finished, tmp_path / "run")
    damage(folder, "checkpoints/best/adapters.safetensors", "bit")
    with pytest.raises(UserError, match=r"adapters\.safetensors: it was changed"):
        open_source(str(folder))


# --- what was measured ---


def test_memory_and_seconds_outlive_a_resume(examined, tmp_path):
    folder = copy_of(examined.folder, tmp_path / "run")
    state_file = folder / runs.CHECKPOINTS / "000005" / runs.STATE
    state, _ = read_checked(state_file)
    assert state["peak_memory_bytes"] > 0
    state["peak_memory_bytes"] = 2**50
    write_json(state_file, with_digest(state))
    go_on(folder, options_of(folder))
    summary, _ = read_checked(folder / runs.SUMMARY)
    assert summary["peak_memory_bytes"] == 2**50
    seconds = summary["seconds"]
    probe, before, after = (
        read_checked(folder / name)[0]["seconds"]
        for name in (runs.PROBE, runs.EXAM, runs.EXAM_AFTER)
    )
    assert min(probe, before, after) > 0
    assert seconds["exam"] == pytest.approx(before + after, abs=0.06)
    assert seconds["headroom"] >= round(probe, 1)
    batches = sum(row["seconds"] for row in runs.read_lines(folder / runs.METRICS))
    assert seconds["total"] == pytest.approx(
        batches + seconds["exam"] + seconds["headroom"], abs=0.2
    )


# --- runs of older versions ---


def test_a_run_of_an_older_version_goes_on_with_a_note(examined, resume, tmp_path):
    """Without a digest anywhere but those of a checkpoint's binary files."""
    folder = copy_of(examined.folder, tmp_path / "run")
    for path in (folder / runs.CHECKPOINTS).glob(f"0*/{runs.STATE}"):
        state, _ = read_checked(path)
        for name in ("log_sha256", "editable", "checkpoint_every", "peak_memory_bytes"):
            del state[name]
        write_json(path, state)
    manifest = runs.read_manifest(folder)
    old = ("device", "blas", "threads")
    manifest["backend"] = {name: manifest["backend"][name] for name in old}
    write_json(folder / runs.MANIFEST, manifest)
    exam, _ = read_checked(folder / runs.EXAM)
    write_json(folder / runs.EXAM, exam["results"])
    probe, _ = read_checked(folder / runs.PROBE)
    del probe["seconds"]
    write_json(folder / runs.PROBE, probe)
    status, said = resume(folder)
    assert status == 0
    noted = examined.noticed(said)
    assert "manifest.json: its digest is missing" in noted[0]
    assert noted[1].startswith("checkpoint 000005 has ")
    assert {text.split(" has ")[0] for text in noted[2:]} == {runs.PROBE, runs.EXAM}
    assert len(noted) == 4
    # Nor did it say which examination it was.
    expected = copy.deepcopy(examined.comes_to)
    del expected[runs.EXAM]["exam_sha256"]
    assert outcome(folder) == expected


# --- runs of self-distillation ---

SELF = {
    **{"student": "tiny-student", "critic": "truth", "seed": 2, "lora_rank": 2, "lora_rate": 1e-2},
    **{"episodes": 2, "batch_size": 1, "max_answer_tokens": 12, "max_feedback_tokens": 12},
    **{"probe_size": 2, "checkpoint_every": 1, "kd_steps": 1},
}


@pytest.fixture(scope="module")
def self_distilled(tmp_path_factory) -> Stopped:
    """Stopped after its first batch of one; its teacher's weights move."""
    folder = tmp_path_factory.mktemp("self")
    config = configured("resd", SELF)

    def go(target: Path, stop: Callable[[], bool] = lambda: False) -> set[str]:
        warned: set[str] = set()
        plan = self_session.make_plan(config)
        with runs.locked(target):
            if not runs.is_run(target):
                runs.create(target, to_toml(plan.config), plan.manifest)
            job = Job(
                *(target, plan.config, plan.probe, plan.problems),
                *(lambda e: warned.add(e.text) if isinstance(e, Warned) else None, stop),
            )
            training.run(job, self_session.open_models(plan))
        return warned

    asked = iter([False, True])
    go(folder / "stopped", lambda: next(asked))
    whole = copy_of(folder / "stopped", folder / "whole")
    warned = go(whole)
    return Stopped(folder / "stopped", outcome(whole), warned)


@pytest.mark.parametrize(
    ("name", "way"),
    by_day(
        [
            *((runs.HEADROOM, way) for way in ("digit 10%", "brace", "half", "gone")),
            *((runs.ATTEMPTS, way) for way in ("digit 50%", "line", "gone")),
            *((f"checkpoints/000001/{runs.STATE}", way) for way in ("digit 50%", "line")),
            ("checkpoints/000001/teacher.safetensors", "bit"),
            ("checkpoints/000001/teacher.safetensors", "gone"),
        ]
    ),
)
def test_a_damaged_file_of_a_run_of_self_distillation(name, way, self_distilled, resume, tmp_path):
    folder = copy_of(self_distilled.folder, tmp_path / "run")
    damage(folder, name, way)
    before = files_of(folder)
    status, said = resume(folder)
    if status == 2:
        assert files_of(folder) == before and "Nothing was changed." in said
        return
    assert status == 0 and self_distilled.noticed(said), said
    came = outcome(folder)
    assert {part for part, value in self_distilled.comes_to.items() if came[part] != value} == set()
