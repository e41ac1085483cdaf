"""What a run's student has learned from is not held out, whichever run it learned it in."""

import json
import shutil

import pytest

from mlx_fd import runs
from mlx_fd.cli import cli
from mlx_fd.errors import UserError
from mlx_fd.evaluation import suites
from mlx_fd.evaluation.target import open_target
from mlx_fd.files import digest_of
from mlx_fd.runs.checked import DIGEST

SHORT = {
    "batch-size": 1,
    "max-answer-tokens": 4,
    "max-feedback-tokens": 4,
    "max-merge-tokens": 4,
    "exam-size": 0,
}


def call(*command):
    cli([str(part) for part in command], standalone_mode=False)


def loop(out, *options):
    short = [f"--{name}={value}" for name, value in SHORT.items()]
    call("loop", *options, *short, "--out", out, "--quiet")
    return out


def problems(path, first):
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(first, first + 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run on generated problems, one that goes on with it on a file, and one that follows."""
    folder = tmp_path_factory.mktemp("chain")
    first = loop(folder / "first", "--expert=tiny", "--episodes=1", "--probe-size=1")
    files = [problems(folder / f"{name}.jsonl", n) for name, n in (("one", 0), ("two", 10))]
    second = loop(folder / "second", "--continue", first, "--problems", files[0])
    third = loop(folder / "third", "--continue", second, "--problems", files[1])
    # What is known must not rest on the earlier runs' being there still.
    shutil.move(first, folder / "elsewhere")
    shutil.move(second, folder / "elsewhere too")
    return third, files


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_goes_on_names_all_that_was_learned_from(chain):
    run, (one, _) = chain
    before = runs.read_manifest(run)["learned_before"]
    assert [(row["name"], row["split"]) for row in before] == [
        (str(one), "train"),
        ("arithmetic", "train"),
    ]
    assert before[0]["sha256"] == digest_of(one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_an_earlier_run_learned_from_is_not_held_out(chain, tmp_path):
    run, (one, two) = chain
    target = open_target(str(run), None)

    def concerns(source, split="test"):
        return suites.concerns(target, suites.Options(problems=str(source), split=split))

    (said,) = concerns("arithmetic", "train")
    assert "learned from these problems (arithmetic, split train)" in said
    assert not concerns("arithmetic")
    for source in (one, two, shutil.copy(one, tmp_path / "a copy.jsonl")):
        (said,) = concerns(source)
        assert f"learned from these problems ({source}): what follows" in said
    assert not concerns(problems(tmp_path / "other.jsonl", 20))
    # Problems of the earlier run's source are like its own.
    assert suites.source_of(target, None) == "arithmetic"
    assert not suites.concerns(target, suites.Options())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_neither_command_takes_them_for_held_out(chain, capfd):
    run, (one, _) = chain
    for source, split in (("arithmetic", "train"), (one, "test")):
        asked = ("--problems", source, "--split", split)
        with pytest.raises(UserError, match=r"learned from these problems \(.*, split"):
            call("cascade", "calibrate", run, "--risk", "0.6", *asked)
        capfd.readouterr()
        call("eval", run, *asked, "--limit", "1", "--quiet")
        said = capfd.readouterr()
        assert "the run learned from these problems" in " ".join((said.out + said.err).split())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_manifest_of_an_older_version_names_its_own_problems(chain, tmp_path):
    run, (one, two) = chain
    older = shutil.copytree(run, tmp_path / "older", symlinks=True)
    manifest = json.loads((older / runs.MANIFEST).read_text())
    del manifest["learned_before"], manifest[DIGEST]
    (older / runs.MANIFEST).write_text(json.dumps(manifest))
    target = open_target(str(older), None)
    said = [suites.concerns(target, suites.Options(problems=str(file))) for file in (one, two)]
    assert [len(texts) for texts in said] == [0, 1]
