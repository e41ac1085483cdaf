"""A run that goes on: how many problems of a file it learns from, and what it begins with."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from mlx_fd import runs
from mlx_fd.cli import cli
from mlx_fd.config import Config, ProblemOptions, options_in, override
from mlx_fd.errors import UserError
from mlx_fd.runs.continued import asked_kind, loop_configuration, sizes
from mlx_fd.serve.kept import EXPERT, Kept
from mlx_fd.training.session import resume_run, run_loop
from support.loops import Killed, count_syncs
from support.trained import make_run

SHORT = {
    "episodes": 1,
    "batch_size": 4,
    "max_answer_tokens": 4,
    "max_feedback_tokens": 4,
    "max_merge_tokens": 4,
    "probe_size": 1,
    "exam_size": 0,
}

EARLIER = override(Config(), {"probe_size": 32}, "")


@pytest.fixture
def file(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(10)]
    rows.append({**rows[0], "question": "0  +\n1?"})  # the first once more
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"episodes": 8, "probe_size": 2}),
        ({"probe_size": 9}, {"episodes": 1, "probe_size": 9}),
        ({"episodes": 3}, {}),
    ],
)
def test_all_are_learned_from_but_a_few_that_are_held_out(file, given, wanted):
    assert sizes({"problems": file, **given}, EARLIER) == wanted


def test_rows_are_skipped_where_the_earlier_run_skipped_them(file):
    """The run itself did; the count before it refused the file."""
    with Path(file).open("a") as rows:
        rows.write("not a row\n")
    given = {"problems": file}
    skips = override(EARLIER, {"skip_bad_rows": True}, "")
    assert sizes(given, skips) == {"episodes": 8, "probe_size": 2}
    with pytest.raises(UserError, match=r"kept\.jsonl:12"):
        sizes({**given, "skip_bad_rows": False}, skips)
    with pytest.raises(UserError, match=r"kept\.jsonl:12"):
        sizes(given, EARLIER)


@pytest.mark.parametrize("probe", [10, 40])
def test_not_all_can_be_held_out(file, probe):
    """It was said of the episodes, which nobody asked for: at least 1, not -30."""
    with pytest.raises(UserError, match=f"--probe-size {probe}: .* ask for at most 9"):
        sizes({"problems": file, "probe_size": probe}, EARLIER)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_answers_are_of_the_kind_that_the_student_gives(tmp_path):
    """Rows with years alone were numbers, to a student that is asked for a few words."""
    names = ["Ann", "Tom", "Eva", "Leo", "Ida", "Jo"]
    rows = [{"prompt": f"Who is {n}?", "gold": name} for n, name in enumerate(names)]
    first, kept = tmp_path / "first.jsonl", tmp_path / "kept.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = Kept(kept, 10, "text")
    for n in range(6):
        assert file.add(f"When was house {n} built?", f"Then.\n#### 19{n}0", EXPERT)
    given = {"problems": str(first), "columns": "question=prompt,answer=gold", "expert": "tiny"}
    run = make_run(tmp_path / "run", "tiny-student", **{**SHORT, **given})
    for changed, source, wanted in (
        ({}, str(kept), "text"),
        ({}, "arithmetic", "auto"),
        ({"answer_kind": "math"}, str(kept), "math"),
    ):
        options = dataclasses.replace(ProblemOptions(problems=source), **changed)
        assert asked_kind(options, str(run)) == wanted
    short = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    command = ["loop", "--problems", str(kept), "--continue", str(run), *short]
    cli([*command, "--out", str(tmp_path / "new"), "--quiet"], standalone_mode=False)
    assert runs.read_manifest(tmp_path / "new")["problems"]["kind"] == "text"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run_loop("tiny", out=folder, kd_steps=2, **SHORT)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, id="all of the file"),
        pytest.param({"expert": "tiny", "episodes": 2, "probe_size": 2, "kd_steps": 3}, id="sizes"),
    ],
)
def test_python_and_a_file_go_on_as_the_command_does(earlier, file, given, tmp_path):
    """Without the earlier run's options Python had others, or wanted 400 problems of the 7B."""
    given = {"problems": file, "continue_from": str(earlier), **given}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    cli(["loop", *flags, "--out", str(tmp_path / "cli"), "--quiet"], standalone_mode=False)
    run_loop(out=tmp_path / "python", stop=lambda: True, **given)
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in given.items()]
    (tmp_path / "run.toml").write_text("".join(lines))
    run_loop(out=tmp_path / "file", stop=lambda: True, config=tmp_path / "run.toml")
    config, python, of_file = (tmp_path / name / runs.CONFIG for name in ("cli", "python", "file"))
    assert python.read_text() == of_file.read_text() == config.read_text()
    wanted = {**SHORT, "kd_steps": 2, "episodes": 9, "answer_kind": "number", **given}
    found = options_in(config)
    assert {name: found[name] for name in wanted} == wanted


def test_the_pair_brings_no_preset_where_a_run_goes_on(earlier, file):
    given = {"problems": file, "continue_from": str(earlier)}
    wanted = loop_configuration(None, None, given, "test")
    assert loop_configuration(None, None, {**given, "expert": "tiny"}, "test") == wanted


def test_a_preset_and_a_file_are_given_too(earlier, tmp_path):
    """What they say holds, and what they do not say is the earlier run's."""
    sizes_of = tmp_path / "sizes.toml"
    sizes_of.write_text("kd_steps = 5\n")
    given = {"continue_from": str(earlier)}
    config = loop_configuration("16gb", sizes_of, given, "test")
    assert (config.generation.batch_size, config.training.kd_steps) == (2, 5)
    assert (config.problems.episodes, config.models.expert) == (1, "tiny")
    whole = loop_configuration(None, earlier / runs.CONFIG, given, "test")
    assert whole == loop_configuration(None, None, given, "test")


def test_a_warm_up_is_over_unless_it_is_asked_for(tmp_path, earlier):
    warm = tmp_path / "warm"
    shutil.copytree(earlier, warm, symlinks=True)
    config = (warm / runs.CONFIG).read_text()
    (warm / runs.CONFIG).write_text(config.replace('warm_up = ""', 'warm_up = "distil:4"'))
    given = {"continue_from": str(warm)}
    asked = tmp_path / "asked.toml"
    asked.write_text(f'continue_from = "{warm}"\nwarm_up = "distil:2"\n')
    found = [
        loop_configuration(None, file, said, "test").episode.warm_up
        for file, said in (
            (None, given),
            (warm / runs.CONFIG, given),
            (None, {**given, "warm_up": "distil:3"}),
            (asked, {}),
        )
    ]
    assert found == ["", "", "distil:3", "distil:2"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("flushes", "begun", "is_run"),
    [
        pytest.param(4, False, False, id="amid the weights"),
        pytest.param(8, True, False, id="before there is a run"),
        pytest.param(14, True, True, id="just after"),
    ],
)
def test_a_kill_at_the_beginning_leaves_what_can_be_begun_or_gone_on_with(
    earlier, flushes, begun, is_run, tmp_path, monkeypatch
):
    """A run without the weights that it began with could be neither."""
    folder, given = tmp_path / "run", {**SHORT, "continue_from": str(earlier)}
    with monkeypatch.context() as patched:
        count_syncs(patched, flushes)
        with pytest.raises(Killed):
            run_loop("tiny", out=folder, **given)
    assert ((folder / runs.BEGUN).exists(), runs.is_run(folder)) == (begun, is_run)
    if is_run:
        resume_run(folder, stop=lambda: True)
    else:
        run_loop("tiny", out=folder, stop=lambda: True, **given)
    for name in ("adapters.safetensors", "heads.safetensors"):
        wanted = (earlier / "checkpoints" / "best" / name).read_bytes()
        for where in (runs.BEGUN, "checkpoints/000000"):
            assert (folder / where / name).read_bytes() == wanted
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_of_its_own_keeps_nothing_of_one_that_a_kill_ended(earlier, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        count_syncs(patched, 8)
        with pytest.raises(Killed):
            run_loop("tiny", out=tmp_path / "run", **SHORT, continue_from=str(earlier))
    run_loop("tiny", out=tmp_path / "run", stop=lambda: True, **SHORT)
    assert not (tmp_path / "run" / runs.BEGUN).exists()
