import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.files import append_lines, write_atomic, write_json


def make_run(folder: Path) -> Path:
    runs.create(folder, "seed = 1\n", {"seed": 1})
    return folder


def save(folder: Path, batch: int, best: int = 0, keep: int = 3) -> None:
    def write(to: Path) -> None:
        (to / "weights.bin").write_bytes(bytes([batch]) * 100)

    sizes = {
        name: (folder / name).stat().st_size if (folder / name).exists() else 0
        for name in (runs.EPISODES, runs.METRICS)
    }
    runs.save_checkpoint(
        folder, batch, write, {"best_batch": best, "log_bytes": sizes}, best=best, keep=keep
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
    found, broken = runs.newest_checkpoint(run)
    assert found.batch == 5 and not broken


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "no state", "half state", "empty"])
def test_a_broken_checkpoint_is_passed_over(harm, tmp_path):
    run = make_run(tmp_path / "run")
    append_lines(run / runs.EPISODES, [{"episode": 0}])
    save(run, 1, best=1)
    append_lines(run / runs.EPISODES, [{"episode": 1}])
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
    found, broken = runs.newest_checkpoint(run)
    assert found.batch == 1 and broken == ["checkpoint 000002 is not whole"]
    runs.roll_back(run, found)
    assert runs.read_lines(run / runs.EPISODES) == [{"episode": 0}]
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["000001", "000002.broken", "best", "last"]
    assert (run / "checkpoints" / "best").readlink() == Path("000001")


def test_no_checkpoint_goes_back_to_the_beginning(tmp_path):
    run = make_run(tmp_path / "run")
    append_lines(run / runs.EPISODES, [{"episode": 0}])
    (run / "checkpoints" / ".tmp-0123456789abcdef").mkdir()
    found, _ = runs.newest_checkpoint(run)
    assert found is None
    runs.roll_back(run, found)
    assert (run / runs.EPISODES).read_bytes() == b""
    assert not list((run / "checkpoints").iterdir())


def test_a_log_that_lost_lines_is_noticed(tmp_path):
    run = make_run(tmp_path / "run")
    append_lines(run / runs.EPISODES, [{"episode": 0}])
    save(run, 1)
    (run / runs.EPISODES).write_text("")
    with pytest.raises(UserError, match="has lost lines that checkpoint 000001 knew"):
        runs.newest_checkpoint(run)


def test_where_no_checkpoint_is_whole_nothing_is_touched(tmp_path):
    run = make_run(tmp_path / "run")
    append_lines(run / runs.EPISODES, [{"episode": 0}])
    for batch in (1, 2):
        save(run, batch, best=1)
        (run / "checkpoints" / f"{batch:06d}" / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="000002 is not whole; checkpoint 000001 is not whole"):
        runs.newest_checkpoint(run)
    assert len(runs.read_lines(run / runs.EPISODES)) == 1
    assert (run / "checkpoints" / "000001").is_dir()


def test_lost_log_lines_go_back_to_a_checkpoint_before_them(tmp_path):
    run = make_run(tmp_path / "run")
    append_lines(run / runs.EPISODES, [{"episode": 0}])
    save(run, 1, best=1)
    size = (run / runs.EPISODES).stat().st_size
    append_lines(run / runs.EPISODES, [{"episode": 1}])
    save(run, 2, best=1)
    with (run / runs.EPISODES).open("r+") as file:
        file.truncate(size + 3)
    found, why = runs.newest_checkpoint(run)
    assert found.batch == 1 and "lost lines" in why[0]
    runs.roll_back(run, found)
    assert (run / runs.EPISODES).stat().st_size == size


def test_the_best_of_a_checkpoint_gone_back_to_is_still_there(tmp_path):
    run = make_run(tmp_path / "run")
    for batch in range(2, 11):
        save(run, batch, best=10 if batch == 10 else 2, keep=2)
    (run / "checkpoints" / "000010" / "weights.bin").write_bytes(b"")
    found, _ = runs.newest_checkpoint(run)
    runs.roll_back(run, found)
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

    with pytest.raises(UserError, match=r"No space left.*mlx-fd resume"), runs.explained(tmp_path):
        write_to_a_full_disk()


def test_only_a_failed_write_counts_as_one(tmp_path):
    arrays = {"a": mx.zeros(1)}
    with pytest.raises(RuntimeError) as unwritten:
        mx.save_safetensors(str(tmp_path / "nowhere" / "a.safetensors"), arrays)
    assert runs.failed_write(unwritten.value) == str(unwritten.value)
    assert runs.failed_write(OSError(28, "No space left on device")) == "No space left on device"
    assert runs.failed_write(RuntimeError("[matmul] shapes do not fit")) is None


def test_manifest_of_something_else(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        runs.read_manifest(tmp_path)
    run = make_run(tmp_path / "run")
    assert runs.read_manifest(run) == {"seed": 1}
    (run / runs.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        runs.read_manifest(run)
