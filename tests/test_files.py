"""Files are written whole, through no link, and never mixed with another writer's."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from mlx_fd import files, runs
from mlx_fd.errors import UserError

CONTENTS = {letter: letter * 200_000 for letter in "ab"}


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs some code, which finds its arguments in ``argv``."""
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom mlx_fd import files\n"
    head += "argv = sys.argv[1:]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended_well(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


WRITERS = {
    "write_atomic": "files.write_atomic(path, letter * 200_000)",
    "write_json": "files.write_json(path, letter * 200_000)",
    "write_with": "files.write_with(path, lambda to: to.write_text(letter * 200_000))",
}


@pytest.mark.parametrize("how", WRITERS)
def test_two_writers_of_one_path_never_mix_or_fail(how, tmp_path):
    """While they write, others read the file and clear the folder of left-overs."""
    path = tmp_path / "file.json"
    path.write_text(CONTENTS["a"])
    code = (
        "import time\npath, letter = Path(argv[0]), argv[1]\nend = time.monotonic() + 1.5\n"
        f"while time.monotonic() < end:\n    {WRITERS[how]}\n"
    )
    clearing = (
        "import time\nend = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n    files.clear_unfinished(Path(argv[0]))\n"
    )
    processes = [child(code, path, letter) for letter in "ab"] + [child(clearing, tmp_path)]
    seen = set()
    while any(process.poll() is None for process in processes):
        seen.add(path.read_text().strip('"\n'))
        time.sleep(0.001)
    for process in processes:
        ended_well(process)
    assert seen <= set(CONTENTS.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_left_overs_of_killed_processes_go_and_what_is_being_written_stays(tmp_path):
    code = (
        "folder = Path(argv[0])\n"
        "with files.replacing(folder / 'file') as file, files.working_folder(folder) as work:\n"
        "    file.write(b'half'); file.flush(); (work / 'part').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = child(code, tmp_path)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    killed.communicate()
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2 and all(path.name.startswith(".tmp-") for path in left)
    kept = {".tmp-notes": "mine", ".tmp-0123456789abcdef-mine": "mine", ".tmp-mine.txt": "mine"}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".tmp-fedcba9876543210").symlink_to(".tmp-notes")
    with files.replacing(tmp_path / "file") as file, files.working_folder(tmp_path) as work:
        file.write(b"whole")
        files.clear_unfinished(tmp_path)
        assert work.is_dir() and not any(path.exists() for path in left)
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert {name: (tmp_path / name).read_text() for name in kept} == kept


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    with pytest.raises(RuntimeError):
        files.write_with(path, lambda to: (_ for _ in ()).throw(RuntimeError))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for write in (
        lambda path: files.write_atomic(path, "new"),
        lambda path: files.write_json(path, "new"),
        lambda path: files.write_with(path, lambda to: to.write_text("new")),
    ):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to("victim")
        write(link)
        assert not link.is_symlink() and "new" in link.read_text()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("to", ["file", "nothing", "pipe", "device", "folder"])
@pytest.mark.parametrize("change", ["append", "cut"])
def test_what_is_no_file_is_neither_grown_nor_cut(change, to, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "log.jsonl"
    victim.write_text("precious")
    if to == "pipe":
        os.mkfifo(path)
    elif to == "device":
        path.symlink_to("/dev/full")
    elif to == "folder":
        (tmp_path / "there").mkdir()
        path.symlink_to("there")
    else:
        path.symlink_to("victim" if to == "file" else "nowhere")
    with pytest.raises(UserError, match="not a regular file"):
        files.append_lines(path, [{"a": 1}]) if change == "append" else files.truncate(path, 0)
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_another_name_of_a_file_keeps_its_content(tmp_path):
    path, backup = tmp_path / "log.jsonl", tmp_path / "backup"
    files.append_lines(path, [{"a": 1}])
    os.link(path, backup)
    files.append_lines(path, [{"a": 2}])
    assert backup.read_text() == '{"a": 1}\n' and path.read_text() == '{"a": 1}\n{"a": 2}\n'
    backup.unlink()
    os.link(path, backup)
    files.truncate(path, 9)
    assert backup.read_text() == '{"a": 1}\n{"a": 2}\n' and path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("read", [runs.read_lines, files.digest_of], ids=["lines", "digest"])
def test_reading_a_pipe_does_not_hang(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path / "pipe")


def test_a_folder_of_ours_leads_nowhere_else(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    assert files.subfolder(run, "eval", "fast").is_dir()
    (run / "sweep").symlink_to("../elsewhere")
    for names in (("sweep",), ("sweep", "one")):
        with pytest.raises(UserError, match="this is a link"):
            files.subfolder(run, *names)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    # Whoever names a link to a folder means the folder.
    (tmp_path / "link").symlink_to("run")
    assert files.subfolder(tmp_path / "link", "eval") == tmp_path / "link" / "eval"


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)]
)
def test_permissions_are_those_of_the_umask(umask, file, folder, tmp_path):
    code = (
        "from mlx_fd import runs\nfrom mlx_fd.runs import checkpoints, marks\n"
        "from mlx_fd.models.storage import new_directory\n"
        "os.umask(int(argv[1])); here = Path(argv[0])\n"
        "with runs.locked(here / 'run'):\n"
        "    runs.create(here / 'run', '', {})\n"
        "    files.append_lines(here / 'run' / 'episodes.jsonl', [{}])\n"
        "    write = lambda to: (to / 'weights').write_text('x')\n"
        "    checkpoints.save_checkpoint(\n"
        "        here / 'run', 0, write, {'best_batch': 0}, {}, best=0, keep=1)\n"
        "with marks.claimed(here / 'eval', marks.EVALUATION):\n"
        "    files.write_with(here / 'eval' / 'a.txt', lambda to: to.write_text('x'))\n"
        "with new_directory(here / 'model') as working:\n"
        "    (working / 'a.txt').write_text('x')\n"
    )
    ended_well(child(code, tmp_path, umask))
    found = {
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode))
        for path in tmp_path.rglob("*")
        if not path.is_symlink()
    }
    assert found == {(True, folder), (False, file)}
