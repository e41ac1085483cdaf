import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.files import append_lines, digest_of, failed_write, write_atomic, write_json
from mlx_fd.runs import checkpoints
from mlx_fd.runs.checked import DIGEST
from mlx_fd.runs.logs import Log, log_size
from mlx_fd.runs.records.manifest import SCHEMA_VERSION


def make_run(folder: Path) -> Path:
    runs.create(folder, "seed = 1\n", {"schema_version": SCHEMA_VERSION, "seed": 1})
    return folder


def logs_of(folder: Path) -> dict[str, Log]:
    """The logs with all that is in them."""
    return {name: Log.read(folder / name, log_size(folder / name)) for name in runs.LOGS}


def append(folder: Path, name: str, *rows: dict) -> None:
    logs_of(folder)[name].append(rows)


def save(folder: Path, batch: int, best: int = 0, keep: int = 3) -> None:
    def write(to: Path) -> None:
        (to / "weights.bin").write_bytes(bytes([batch]) * 100)

    checkpoints.save_checkpoint(
        folder, batch, write, {"best_batch": best}, logs_of(folder), best=best, keep=keep
    )


def test_atomic_write_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_is_not_made_over_something(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="mlx-fd resume"):
        make_run(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="choose another --out"):
        make_run(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"


def test_read_lines_leaves_out_a_half_written_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_lines(path, [{"a": 1}, {"a": "ü\n"}])
    with path.open("a") as file:
        file.write('{"a": 3')
    assert runs.read_lines(path) == [{"a": 1}, {"a": "ü\n"}]


def test_checkpoints_are_found_pruned_and_pointed_to(tmp_path):
    run = make_run(tmp_path / "run")
    for batch in range(6):
        save(run, batch, best=min(batch, 1), keep=2)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["000001", "000004", "000005", "best", "last"]
    assert (run / "checkpoints" / "last").readlink() == Path("000005")
    assert (run / "checkpoints" / "best").readlink() == Path("000001")
    found, broken = checkpoints.newest_checkpoint(run)
    assert found.batch == 5 and not broken


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "no state", "half state", "empty"])
def test_a_broken_checkpoint_is_passed_over(harm, tmp_path):
    run = make_run(tmp_path / "run")
    append(run, runs.EPISODES, {"episode": 0})
    save(run, 1, best=1)
    append(run, runs.EPISODES, {"episode": 1})
    save(run, 2, best=2)
    folder = run / "checkpoints" / "000002"
    weights, state = folder / "weights.bin", folder / "state.json"
    if harm == "flip":
        weights.write_bytes(b"\x00" + weights.read_bytes()[1:])
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "missing":
        weights.unlink()
    elif harm == "no state":
        state.unlink()
    elif harm == "half state":
        state.write_text(state.read_text()[:20])
    else:
        state.write_text("[]")
    found, broken = checkpoints.newest_checkpoint(run)
    assert found.batch == 1 and broken == ["checkpoint 000002 is not whole"]
    checkpoints.roll_back(run, found, runs.cut_folder(run), ordinary=False)
    assert runs.read_lines(run / runs.EPISODES) == [{"episode": 0}]
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["000001", "best", "last"]
    # What was cut is still there.
    [cut] = (run / "cut").iterdir()
    assert sorted(p.name for p in cut.iterdir()) == ["000002", runs.EPISODES]
    assert runs.read_lines(cut / runs.EPISODES) == [{"episode": 1}]
    assert (run / "checkpoints" / "best").readlink() == Path("000001")


def go_back(run: Path, every: int = 1) -> checkpoints.Checkpoint | None:
    """What a resume does, unless it refuses."""
    found, passed_over = checkpoints.check_nothing_lost(run, every)
    checkpoints.roll_back(run, found, runs.cut_folder(run), ordinary=not passed_over)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_without_a_checkpoint_and_without_lines_is_at_its_beginning(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / ".tmp-0123456789abcdef").mkdir()
    assert go_back(run) is None
    assert not list((run / "checkpoints").iterdir())
    assert not (run / "cut").exists()


@pytest.mark.parametrize("what", ["all", "folder", "newest", "finished"])
def test_lost_checkpoints_are_not_taken_for_a_kill(what, tmp_path):
    run = make_run(tmp_path / "run")
    save(run, 0)
    for batch in range(1, 6):
        append(run, runs.METRICS, {"batch": batch - 1})
        append(run, runs.EPISODES, {"episode": batch - 1})
        save(run, batch, best=batch)
    if what == "folder":
        shutil.rmtree(run / "checkpoints")
    elif what == "finished":
        write_json(run / runs.SUMMARY, {})
        shutil.rmtree(run / "checkpoints" / "000005")
    else:
        for path in (run / "checkpoints").iterdir():
            if not path.is_symlink() and (what == "all" or int(path.name) > 3):
                shutil.rmtree(path)
    before = files_of(run)
    with pytest.raises(UserError, match=f"Nothing was changed.*{checkpoints.REDO}") as error:
        go_back(run)
    assert "logs have 5 batches" in str(error.value)
    assert files_of(run) == before
    # The user says so: what is cut is kept.
    found, _ = checkpoints.newest_checkpoint(run)
    assert (found and found.batch) == {"newest": 3, "finished": 4}.get(what)
    checkpoints.roll_back(run, found, runs.cut_folder(run), ordinary=False)
    left = found.batch if found else 0
    assert len(runs.read_lines(run / runs.METRICS)) == left
    [cut] = (run / "cut").iterdir()
    kept = (run / runs.METRICS).read_bytes() + (cut / runs.METRICS).read_bytes()
    assert kept == before[runs.METRICS]


def test_what_a_kill_leaves_is_cut_and_kept_until_the_next(tmp_path):
    run = make_run(tmp_path / "run")
    save(run, 0)
    for number in range(3):
        append(run, runs.METRICS, {"batch": number})
    with (run / runs.METRICS).open("a") as file:
        file.write('{"batch": 3')
    with pytest.raises(UserError, match="checkpoints are missing"):
        go_back(run, every=2)
    whole = (run / runs.METRICS).read_bytes()
    assert go_back(run, every=3).batch == 0
    assert (run / runs.METRICS).read_bytes() == b""
    assert (run / "cut" / "tail" / runs.METRICS).read_bytes() == whole
    append(run, runs.METRICS, {"batch": 0})
    go_back(run)
    assert [p.name for p in (run / "cut").iterdir()] == ["tail"]
    assert runs.read_lines(run / "cut" / "tail" / runs.METRICS) == [{"batch": 0}]


def test_more_batches_than_the_configuration_has_now_may_have_come_since(tmp_path):
    """The checkpoint says how many come before the next: the option was changed since."""
    run = make_run(tmp_path / "run")
    checkpoints.save_checkpoint(
        *(run, 0, lambda to: None, {"best_batch": 0, "checkpoint_every": 4}, logs_of(run)),
        best=0,
        keep=2,
    )
    append(run, runs.METRICS, *({"batch": number} for number in range(4)))
    assert go_back(run, every=1).batch == 0


def test_a_log_that_lost_lines_is_noticed(tmp_path):
    run = make_run(tmp_path / "run")
    append(run, runs.EPISODES, {"episode": 0})
    save(run, 1)
    (run / runs.EPISODES).write_text("")
    with pytest.raises(UserError, match="has lost lines that checkpoint 000001 knew"):
        go_back(run)


def test_a_changed_digit_in_a_log_goes_back_before_it(tmp_path):
    run = make_run(tmp_path / "run")
    for number in (1, 2, 3):
        append(run, runs.METRICS, {"batch": number})
        save(run, number, best=number)
    text = (run / runs.METRICS).read_text()
    (run / runs.METRICS).write_text(text.replace("2", "7"))
    found, passed_over = checkpoints.newest_checkpoint(run)
    assert found.batch == 1
    assert [why.split(":")[0] for why in passed_over] == [
        f"{runs.METRICS} is not what checkpoint {name} knew" for name in ("000003", "000002")
    ]
    (run / runs.METRICS).write_text(text.replace("1", "7"))
    with pytest.raises(UserError, match="no checkpoint can be gone back to"):
        go_back(run)


def test_the_digest_of_a_log_runs_on_from_where_it_was_read(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.append([{"a": 1}])
    size, digest = log.size, log.sha256
    log.append([{"a": "ü"}, {"b": 2}])
    assert (log.size, log.sha256) == (path.stat().st_size, digest_of(path))
    again = Log.read(path, size)
    assert again.sha256 == digest
    with pytest.raises(UserError, match="something else changed this log"):
        again.append([{"b": 3}])
    again.cut()
    again.append([{"a": "ü"}, {"b": 2}])
    assert again.sha256 == log.sha256 == digest_of(path)
    assert Log.read(path, log.size + 1) is None
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(UserError, match="not a regular file"):
        Log(tmp_path / "link.jsonl").append([{"a": 1}])


def test_a_state_whose_digest_was_taken_away_is_none_of_an_older_version(tmp_path):
    run = make_run(tmp_path / "run")
    save(run, 1)
    path = run / "checkpoints" / "000001" / runs.STATE
    state = json.loads(path.read_text())
    del state[DIGEST]
    path.write_text(json.dumps(state))
    assert checkpoints.newest_checkpoint(run) == (None, ["checkpoint 000001 is not whole"])
    del state["log_sha256"]
    path.write_text(json.dumps(state))
    found, _ = checkpoints.newest_checkpoint(run)
    assert not found.vouched


def test_where_no_checkpoint_is_whole_nothing_is_touched(tmp_path):
    run = make_run(tmp_path / "run")
    append(run, runs.EPISODES, {"episode": 0})
    for batch in (1, 2):
        save(run, batch, best=1)
        (run / "checkpoints" / f"{batch:06d}" / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="000002 is not whole; checkpoint 000001 is not whole"):
        go_back(run)
    assert len(runs.read_lines(run / runs.EPISODES)) == 1
    assert (run / "checkpoints" / "000001").is_dir()


def test_a_checkpoint_whose_best_weights_are_whole_goes_before_a_newer_one(tmp_path):
    run = make_run(tmp_path / "run")
    for batch, best in ((1, 1), (2, 2), (3, 2)):
        save(run, batch, best=best, keep=3)
    (run / "checkpoints" / "000002" / "weights.bin").write_bytes(b"")
    found, why = checkpoints.newest_checkpoint(run)
    assert (found.batch, found.best_lost) == (1, False)
    assert why[0] == "of checkpoint 000003 the best weights so far are not whole"
    shutil.rmtree(run / "checkpoints" / "000001")
    found, why = checkpoints.newest_checkpoint(run)
    assert (found.batch, found.best_lost, why) == (3, True, [])


def test_lost_log_lines_go_back_to_a_checkpoint_before_them(tmp_path):
    run = make_run(tmp_path / "run")
    append(run, runs.EPISODES, {"episode": 0})
    save(run, 1, best=1)
    size = (run / runs.EPISODES).stat().st_size
    append(run, runs.EPISODES, {"episode": 1})
    save(run, 2, best=1)
    with (run / runs.EPISODES).open("r+") as file:
        file.truncate(size + 3)
    found, why = checkpoints.newest_checkpoint(run)
    assert found.batch == 1 and "lost lines" in why[0]
    checkpoints.roll_back(run, found, runs.cut_folder(run), ordinary=False)
    assert (run / runs.EPISODES).stat().st_size == size


def test_the_best_of_a_checkpoint_gone_back_to_is_still_there(tmp_path):
    run = make_run(tmp_path / "run")
    for batch in range(2, 11):
        save(run, batch, best=10 if batch == 10 else 2, keep=2)
    (run / "checkpoints" / "000010" / "weights.bin").write_bytes(b"")
    found, _ = checkpoints.newest_checkpoint(run)
    checkpoints.roll_back(run, found, runs.cut_folder(run), ordinary=False)
    assert found.batch == 9
    assert (run / "checkpoints" / "best").resolve().name == "000002"
    assert (run / "checkpoints" / "best" / "weights.bin").exists()


def test_a_run_that_was_only_begun_can_be_made(tmp_path):
    folder = tmp_path / "run"
    with runs.locked(folder):
        (folder / "README.md").write_text("half")
        (folder / "checkpoints").mkdir()
    make_run(folder)
    assert runs.is_run(folder)


@pytest.mark.parametrize("left", ["checkpoints/000000", "episodes.jsonl", "probe.json", "warm_up"])
@pytest.mark.parametrize("lost", [runs.MANIFEST, runs.CONFIG])
def test_a_new_run_does_not_begin_on_the_work_of_another(left, lost, tmp_path):
    """It would go on from it, whatever its own seed and options are."""
    run = make_run(tmp_path / "run")
    (run / left).mkdir(parents=True)
    (run / lost).unlink()
    with pytest.raises(UserError) as refused:
        make_run(run)
    assert f"an earlier run in it ({left}), but no {lost}, as" in str(refused.value)
    assert "copy all of it again, or choose another --out" in str(refused.value)
    with pytest.raises(UserError, match=f"not a run directory .it has no {lost}[)]"):
        runs.read_manifest(run)
    (run / left).rmdir()
    make_run(run)


def test_where_no_link_can_be_made_no_run_begins(tmp_path, monkeypatch):
    def refuse(*given: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(UserError, match=r"no symbolic link can be made there \(Operation not"):
        make_run(tmp_path / "run")
    assert not runs.is_run(tmp_path / "run")
    monkeypatch.undo()
    make_run(tmp_path / "run")


def test_two_processes_cannot_hold_a_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mlx_fd import runs\n"
        "from mlx_fd.errors import UserError\n"
        "try:\n  with runs.locked(Path(sys.argv[1])): print('held')\n"
        "except UserError as error: print(error)"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
        return done.stdout

    with runs.locked(tmp_path):
        assert "another mlx-fd process is writing this run" in other()
    assert other().strip() == "held"


def test_a_full_disk_is_explained(tmp_path):
    def write_to_a_full_disk() -> None:
        Path("/dev/full").write_text("x" * 100000)

    with (
        pytest.raises(UserError, match=r"No space left.*mlx-fd resume"),
        runs.wrap_write_errors(tmp_path),
    ):
        write_to_a_full_disk()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space, then: mlx-fd resume"),
        (errno.EDQUOT, "free some space, then: mlx-fd resume"),
        (errno.EROFS, "when that is mended, then: mlx-fd resume"),
        (errno.EACCES, "when that is mended, then: mlx-fd resume"),
    ],
)
def test_only_a_full_disk_wants_space(number, advice, tmp_path):
    with pytest.raises(UserError, match=advice), runs.wrap_write_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_only_a_failed_write_counts_as_one(tmp_path):
    arrays = {"a": mx.zeros(1)}
    with pytest.raises(RuntimeError) as unwritten:
        mx.save_safetensors(str(tmp_path / "nowhere" / "a.safetensors"), arrays)
    assert failed_write(unwritten.value) == str(unwritten.value)
    assert failed_write(OSError(28, "No space left on device")) == "No space left on device"
    assert failed_write(RuntimeError("[matmul] shapes do not fit")) is None


def test_manifest_of_something_else(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        runs.read_manifest(tmp_path)
    run = make_run(tmp_path / "run")
    assert runs.read_manifest(run) == {"schema_version": SCHEMA_VERSION, "seed": 1}
    assert runs.manifest_fault(run) is None
    text = (run / runs.MANIFEST).read_text()
    (run / runs.MANIFEST).write_text(text.replace('"seed": 1', '"seed": 2'))
    assert "it was changed" in runs.manifest_fault(run)
    # A digit of the digest's own name, too.
    text = (run / runs.MANIFEST).read_text()
    (run / runs.MANIFEST).write_text(text.replace(DIGEST, DIGEST.replace("6", "7")))
    assert "digest is missing" in runs.manifest_fault(run)
    (run / runs.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        runs.read_manifest(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": None, "versions": {"mlx-fd": "0.2.0"}}, r"older version \(mlx-fd 0\.2"),
        ({"schema_version": None}, r"older version \(another mlx-fd\)"),
        ({"schema_version": SCHEMA_VERSION + 1}, "other version"),
    ],
)
def test_a_run_whose_rows_have_other_names_is_refused_in_one_sentence(changes, said, tmp_path):
    run = make_run(tmp_path / "run")
    manifest = {"schema_version": SCHEMA_VERSION, "seed": 1} | changes
    kept = {name: value for name, value in manifest.items() if value is not None}
    (run / runs.MANIFEST).write_text(json.dumps(kept))
    with pytest.raises(UserError, match=f"{said}.*begin a new run, or use that version"):
        runs.read_manifest(run)
