"""What a run's student has learned from is not held out, whichever run it learned it in."""

import json
import shutil

import pytest

from mlx_fd import runs
from mlx_fd.cli import cli
from mlx_fd.errors import UserError
from mlx_fd.evaluation import held_out, suites
from mlx_fd.evaluation.target import open_target
from mlx_fd.files import digest_of
from mlx_fd.problems import load
from mlx_fd.problems.questions import question_digest
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
        return held_out.concerns(target, str(source), split)

    (said,) = concerns("arithmetic", "train")
    assert "learned from these problems (arithmetic, split train)" in said
    assert not concerns("arithmetic")
    for source in (one, two, shutil.copy(one, tmp_path / "a copy.jsonl")):
        (said,) = concerns(source)
        assert f"learned from these problems ({source}): what follows" in said
    assert not concerns(problems(tmp_path / "other.jsonl", 20))
    # Problems of the earlier run's source are like its own.
    assert suites.source_of(target, None) == "arithmetic"
    assert not held_out.concerns(target, None, "test")


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
    said = [held_out.concerns(target, str(file), "test") for file in (one, two)]
    assert [len(texts) for texts in said] == [0, 1]


def mixed(path, *lines):
    """A file of its own with some questions, however they are spaced."""
    rows = [{"question": f" {n}  + 1?\n", "answer": n + 1} for n in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_questions_of_other_files_that_were_learned_from_are_counted(chain, tmp_path, capfd):
    run, _ = chain
    # Two are of the run before it, one is its own.
    some = mixed(tmp_path / "some.jsonl", 0, 100, 2, 101, 11)
    call("eval", run, "--problems", some, "--quiet")
    said = capfd.readouterr()
    assert f"{some} (test): the run learned from 3 of these 5 problems in another source" in (
        " ".join((said.out + said.err).split())
    )
    call("eval", run, "--problems", some, "--limit", "2", "--quiet", "--out", tmp_path / "two")
    said = capfd.readouterr()
    assert "learned from 1 of these 2 problems" in " ".join((said.out + said.err).split())
    other = mixed(tmp_path / "other.jsonl", 100, 101, 100)
    call("eval", run, "--problems", other, "--quiet", "--out", tmp_path / "other")
    said = capfd.readouterr()
    assert "learned from" not in said.out + said.err
    text = " ".join((said.out + said.err).split())
    assert f"{other} (test): 1 of these 3 problems repeat the question of an earlier one" in text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_cascade_leaves_them_out(chain, tmp_path, capfd):
    run, _ = chain
    # One question, however often it is asked, is one draw of those that a promise is about.
    some = mixed(tmp_path / "some.jsonl", 0, 100, 2, 101, 11, 100, 101, 100)
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    call("cascade", "calibrate", copy, "--cost", "0.9", "--problems", some)
    said = capfd.readouterr()
    text = " ".join((said.out + said.err).split())
    assert f"{some} (test): 3 of 8 problems are left out, which the run learned from" in text
    assert "3 of 5 problems are left out, which repeat the question of an earlier one" in text
    found = json.loads((copy / "cascade.json").read_text())
    assert found["questions"] == [question_digest(f"{n} + 1?") for n in (100, 101)]
    assert found["calibration"]["n"] == found["promise"]["of"] == 2
    known = mixed(tmp_path / "known.jsonl", 1, 12)
    with pytest.raises(UserError, match="the run learned from all 2 problems"):
        call("cascade", "calibrate", copy, "--cost", "0.9", "--problems", known)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_an_older_version_knows_the_questions_of_its_logs(chain, tmp_path):
    run, _ = chain
    target = open_target(str(run), None)
    found = load(str(mixed(tmp_path / "some.jsonl", 0, 100, 10, 11, 12)), "test").problems
    assert held_out.unlearned(target, found) == [found[1]]
    older = shutil.copytree(run, tmp_path / "older", symlinks=True)
    (older / runs.QUESTIONS).unlink()
    target = open_target(str(older), None)
    logged = {row["question"] for row in runs.read_episodes(run)}
    assert len(logged) == 2  # the third is the probe's
    left = held_out.unlearned(target, found)
    assert left == [one for one in found if one.question.strip().replace("  ", " ") not in logged]
    assert held_out.unlearned(open_target("tiny-student", None), found) == list(found)
