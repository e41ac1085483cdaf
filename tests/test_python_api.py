"""What a notebook imports from mlx_fd: names, runs, judging, files of answers, the divergence."""

import ast
import dataclasses
import functools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest

import mlx_fd
from mlx_fd.models.backend import backend
from support.draws import ALL
from support.pairs import SMALL, make_dirs, without_seconds
from support.shell import installed, shell

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402

from mlx_fd import (  # noqa: E402
    BatchDone,
    Note,
    Probed,
    Probing,
    Started,
    Step,
    Target,
    UserError,
    Warned,
    fused_linear_divergence,
    give_feedback,
    load_pair,
    open_student,
    resume_run,
    run_loop,
    runs,
    teacher_top_k,
)
from mlx_fd.feedback.judge import locate_model  # noqa: E402
from mlx_fd.feedback.judge_file import (  # noqa: E402
    RESERVED,
    Judging,
    judge_file,
    judged_columns,
    partial_of,
)
from mlx_fd.files import write_atomic  # noqa: E402
from mlx_fd.problems import arithmetic, load  # noqa: E402
from mlx_fd.problems.files import load_answers  # noqa: E402
from mlx_fd.runs.checked import read_checked  # noqa: E402
from mlx_fd.training.planning import new_folder  # noqa: E402
from support import ROOT  # noqa: E402

WEIGHTS = ("adapters.safetensors", "heads.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The names after every Python block of the guide was run, and the folder it was run in."""
    folder = tmp_path_factory.mktemp("guide")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    names: dict[str, typing.Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            # Half of the steps, by day: they are most of what the guide takes.
            source = block if ALL else block.replace('"kd_steps": 16', '"kd_steps": 8')
            exec(compile(source, "docs/python.md", "exec"), names)
    return names, folder


@pytest.fixture(scope="module")
def tiny_run(guide):
    """A run of the tiny pair on eight problems; not to be written to."""
    return guide[1] / "runs" / "eight"


def answered(count: int) -> list[tuple[str, str]]:
    """Problems as the tiny pair knows them, every second with a wrong answer."""
    problems = arithmetic.load("test").problems[:count]
    return [
        (p.question, p.solution if i % 2 else p.solution.replace(f"#### {p.answer}", "#### 1"))
        for i, p in enumerate(problems)
    ]


# The names


def test_every_public_name_is_there_and_in_the_guide():
    assert sorted(mlx_fd.__all__) == sorted(set(mlx_fd.__all__))
    for name in mlx_fd.__all__:
        assert getattr(mlx_fd, name) is not None and name in dir(mlx_fd)
    with pytest.raises(AttributeError, match="no attribute 'run_lop'"):
        mlx_fd.run_lop  # noqa: B018
    table = (ROOT / "docs" / "python.md").read_text().split("## Names")[1]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(mlx_fd.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "mlx_fd" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        name.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert seen == mlx_fd._MODULE_OF
    assert {*seen, "__version__"} == set(mlx_fd.__all__)
    assert (ROOT / "mlx_fd" / "py.typed").is_file()
    for name in ("run_loop", "resume_run", "load_pair", "open_student", "give_feedback"):
        function = getattr(mlx_fd, name)
        assert "return" in function.__annotations__ and "Raises:" in function.__doc__


def test_importing_the_package_imports_no_mlx_and_no_command_line():
    code = (
        "import mlx_fd, sys; print(sorted({'mlx', 'numpy', 'click', 'rich'} & set(sys.modules)));"
        "mlx_fd.Target; from mlx_fd.models.backend import backend; print(backend().blas.note)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    light, blas = done.stdout.splitlines()
    assert light == "[]"
    # The fast BLAS came before MLX did.
    assert "imported before" not in blas


# Runs


def rows(folder: Path) -> list[dict]:
    return without_seconds(runs.read_lines(folder / runs.EPISODES))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {
        f"{file}:{name}": np.array(value)
        for file in WEIGHTS
        for name, value in mx.load(str(folder / "checkpoints" / "last" / file)).items()
    }


def same(one: Path, two: Path) -> None:
    assert rows(one) == rows(two)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def random_run(dirs, tmp_path_factory):
    """A run of a random pair, its result, and its events."""
    folder, events, steps = tmp_path_factory.mktemp("runs") / "whole", [], []
    expert, student = map(str, dirs)
    result = run_loop(
        expert, student=student, out=folder, on_event=events.append, on_step=steps.append, **SMALL
    )
    return result, events, steps


def test_a_run_gives_its_summary_and_its_events(random_run):
    result, events, steps = random_run
    assert result.done and result.summary["episodes"] == 8
    assert (result.summary, True) == read_checked(result.folder / runs.SUMMARY)
    kinds = {Note, Probing, Probed, Started, BatchDone}
    assert {type(event) for event in events} - {Warned} == kinds
    batches = [event for event in events if isinstance(event, BatchDone)]
    assert [event.done for event in batches] == [2, 4, 6, 8]
    assert [len(event.rows) for event in batches] == [2] * 4
    assert steps and all(isinstance(step, Step) and step.tokens > 0 for step in steps)
    lines = [str(event) for event in (*events, *steps)]
    assert all(lines) and max(map(len, lines)) < 400
    assert lines[0] == f"run directory: {result.folder}"
    assert any(line.startswith("8/8 episodes, ") for line in lines)


def test_it_is_the_run_of_the_command_line(dirs, random_run, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    models = ("--expert", dirs[0], "--student", dirs[1])
    done = installed("loop", *models, *options, "--quiet", "--out", "run", cwd=tmp_path)
    assert done.status == 0, done.err
    same(random_run[0].folder, tmp_path / "run")
    ours, its = (runs.read_manifest(folder) for folder in (random_run[0].folder, tmp_path / "run"))
    assert {**ours, "created": ""} == {**its, "created": ""}


def test_a_stopped_run_is_resumed_to_the_run_that_was_not(dirs, random_run, tmp_path):
    expert, student = map(str, dirs)
    batches = []

    def count(event):
        batches.extend([event] * isinstance(event, BatchDone))

    begun = run_loop(
        expert,
        student=student,
        out=tmp_path / "run",
        on_event=count,
        # A batch is told of when it is on the disk, and so after this is asked.
        stop=lambda: len(batches) == 1,
        **SMALL,
    )
    assert (begun.done, begun.summary, len(rows(begun.folder))) == (False, None, 4)
    with pytest.raises(UserError, match="this is already a run"):
        run_loop(expert, student=student, out=begun.folder, **SMALL)
    resumed = resume_run(begun.folder, on_event=count)
    assert resumed.done and resumed.folder == begun.folder
    same(random_run[0].folder, resumed.folder)


def test_an_interrupt_leaves_a_run_that_can_be_resumed(dirs, random_run, tmp_path):
    expert, student = map(str, dirs)

    def interrupt(event):
        if isinstance(event, BatchDone) and event.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_loop(expert, student=student, out=tmp_path / "run", on_event=interrupt, **SMALL)
    resume_run(tmp_path / "run", on_event=lambda event: None)
    same(random_run[0].folder, tmp_path / "run")


def test_lost_checkpoints_are_done_again_only_where_that_is_said(dirs, random_run, tmp_path):
    run = shutil.copytree(random_run[0].folder, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / runs.CHECKPOINTS)
    before = (run / runs.EPISODES).read_bytes()
    with pytest.raises(UserError, match="redo-from-checkpoint"):
        resume_run(run)
    assert (run / runs.EPISODES).read_bytes() == before
    assert resume_run(run, redo_from_checkpoint=True, on_event=lambda event: None).done
    same(random_run[0].folder, run)


def test_without_a_listener_warnings_are_python_s(dirs, tmp_path):
    expert, student = map(str, dirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_loop(expert, student=student, out=tmp_path / "run", **{**SMALL, "episodes": 2})

    # A random expert answers nothing right, and the probe set says so.
    messages = [str(warning.message) for warning in caught]
    assert any("probe problems right" in message for message in messages), messages


def test_what_is_wrong_is_said_before_there_is_a_run(dirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong, message in (
        ({"episods": 3}, "run_loop: there is no option 'episods'.*episodes"),
        ({"episodes": 0}, "run_loop: episodes must be at least 1, not 0"),
        ({"preset": "quik"}, "no preset 'quik'.*quick"),
        ({"expert": "no-such-model"}, "no-such-model"),
        ({"problems": Path("none.jsonl")}, "none.jsonl: there is no such file"),
        ({"config": "none.toml"}, "none.toml: cannot be read"),
        ({"track": ("no_such_tracker",)}, "no_such_tracker"),
    ):
        with pytest.raises(UserError, match=message):
            run_loop(**{"expert": "tiny", "out": "run", **wrong})
    (tmp_path / "own.toml").write_text('[selfdistill]\nmethod = "grpo"\n')
    with pytest.raises(UserError, match="self-distil"):
        run_loop(config="own.toml")
    with pytest.raises(UserError, match="not a run directory"):
        resume_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


def test_a_pair_is_checked_and_ready_to_train(dirs):
    pair = load_pair(*map(str, dirs), lora_rank=3)
    trained = dict(nn.utils.tree_flatten(pair.student.trainable_parameters()))
    assert {value.shape[1] for name, value in trained.items() if name.endswith("lora_a")} == {3}
    assert pair.expert.tokenizer is pair.student_lm.tokenizer and pair.vocab == 400
    assert pair.student_lm.path == dirs[1] and pair.student.score_at == "own"
    with pytest.raises(UserError, match="load_pair: there is no option 'lora_rnk'"):
        load_pair(*map(str, dirs), lora_rnk=3)
    two = load_pair("tiny", str(dirs[1]))  # each with tokens of its own
    assert two.expert.tokenizer is not two.student_lm.tokenizer
    assert two.expert.template != two.student_lm.template


# Judging


def test_the_cell_of_the_guide(guide):
    names, folder = guide
    first = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(first[1].strip().splitlines()) <= 10
    assert names["run"].summary["episodes"] == 8 and names["student"].student is not None
    assert -1 < names["judgement"].head_score < 1 and names["judgement"].written_score < 0
    assert (folder / "runs" / "stopped" / runs.SUMMARY).is_file()
    assert names["value"].item() > 0


def test_batches_give_what_one_by_one_gives(tiny_run):
    student, pairs = open_student(tiny_run), answered(7)
    tokens = []
    found = student.judge(iter(pairs), batch_size=4, max_tokens=48, on_token=tokens.append)
    alone = [give_feedback(student, *pair, max_tokens=48) for pair in pairs]
    assert len(found) == 7 and sum(tokens) > 7 and max(tokens) == 4
    for one, other in zip(found, alone, strict=True):
        assert (one.text, one.written_score, one.finished) == (
            *(other.text, other.written_score, other.finished),
        )
        assert one.head_score == pytest.approx(other.head_score, abs=1e-4)
    # They differ from answer to answer, or the comparison would say nothing.
    assert len({one.text for one in found}) > 3
    assert len({round(one.head_score, 4) for one in found}) > 3
    assert give_feedback(str(tiny_run), *pairs[0], max_tokens=48) == alone[0]
    assert student.judge([]) == []


def test_a_judgement_is_the_loop_s(tiny_run):
    """What the run wrote of an answer with its student, the judge writes of it again."""
    first = open_student(tiny_run / "checkpoints" / "000000")
    row = runs.read_lines(tiny_run / runs.EPISODES)[0]
    again = give_feedback(first, row["question"], row["answer"]["text"], 112)
    assert again.text == row["student_feedback"]["text"]
    assert again.written_score == row["student_feedback"]["written_score"]
    assert again.head_score == 0


def test_a_plain_model_has_no_score_head(dirs):
    judge = open_student(dirs[1])
    assert judge.student is None
    (judgement,) = judge.judge([("1 + 1?", "2")], max_tokens=3)
    assert (judgement.head_score, judgement.written_score) == (None, None)
    assert not judgement.finished
    for pair, options, message in (
        (("1 + 1?", " "), {}, "answer 0 to judge: its answer is empty"),
        (("", "2"), {}, "its problem is empty"),
        (("1 + 1?", "2"), {"batch_size": 0}, "batch_size must be at least 1"),
        (("1 + 1?", "2"), {"max_tokens": 0}, "max_tokens must be at least 1"),
        (("1 + 1?", "2"), {"temperature": -1.0}, "temperature must be a number from 0 on, not -1"),
        (("1 + 1?", "2"), {"temperature": math.nan}, "temperature must be .* not nan"),
        (("1 + 1?", "\ud800"), {}, "its answer is not UTF-8 text"),
        (("1 + 1 " * 2000, "2"), {}, "tokens of feedback do not fit into the 2048 of"),
    ):
        with pytest.raises(UserError, match=message):
            judge.judge([pair], **options)
    with pytest.raises(UserError, match="no-such-run"):
        open_student("no-such-run")


# Files of answers


@pytest.fixture
def file(tmp_path):
    lines = [
        {"question" if i % 2 else "problem": problem, "answer": answer, "row": i}
        for i, (problem, answer) in enumerate(answered(5))
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


command = functools.partial(shell, "feedback", cwd=Path("/"))


def test_a_file_is_judged(tiny_run, file, tmp_path):
    out = tmp_path / "judged.jsonl"
    options = ["--problems", file, "--out", out, "--batch-size", 2, "--tokens", 48]
    done = command(tiny_run, *options, "--json")
    assert (done.status, done.err) == (0, "")
    judged, given = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (out, file)
    )
    assert json.loads(done.out) == {
        "out": str(out),
        "judged": 5,
        "readable": sum(row["readable"] for row in judged),
    }
    student = open_student(tiny_run)
    for row, before in zip(judged, given, strict=True):
        problem = before.get("question") or before["problem"]
        alone = judged_columns(give_feedback(student, problem, before["answer"], 48))
        assert row.pop("head_score") == pytest.approx(alone.pop("head_score"), abs=2e-4)
        assert row == {**before, **alone}
    assert not partial_of(out).exists()
    content = out.read_bytes()
    again = command(tiny_run, *options)
    assert again.status == 2 and "--overwrite" in again.err
    assert out.read_bytes() == content
    assert command(tiny_run, *options, "--overwrite").status == 0
    assert out.read_bytes() == content


def test_no_link_and_no_device_is_replaced(tiny_run, file, tmp_path):
    """As root ``--out /dev/null --overwrite`` made a file of the device."""
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        out = tmp_path / name
        done = command(tiny_run, "--problems", file, "--out", out, "--overwrite")
        assert done.status == 2 and "not a regular file" in done.err
    with pytest.raises(UserError, match="not a regular file"):
        write_atomic(tmp_path / "pipe", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "there").read_text() == "mine"


def test_a_stopped_file_is_gone_on_with(dirs, file, tmp_path):
    ref, out = locate_model(str(dirs[1])), tmp_path / "judged.jsonl"
    answers = load_answers(file)
    loaded = []

    def judge():
        loaded.append(open_student(ref))
        return loaded[-1]

    def stop(done):
        if done == 4:
            raise KeyboardInterrupt

    options = Judging(max_tokens=4, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        judge_file(judge, ref, answers, out, options, stop)
    assert not out.exists()
    partial = partial_of(out)
    # A kill in the middle of a line; and a mark by which a row that is kept is known.
    lines = partial.read_text().splitlines()
    marked = json.dumps({**json.loads(lines[1]), "feedback": "kept"})
    partial.write_text("\n".join([lines[0], marked, lines[2], lines[3], lines[4][:9]]))
    with pytest.raises(UserError, match=r"judged\.jsonl\.partial is of another model"):
        judge_file(judge, ref, answers, out, Judging(max_tokens=5, batch_size=2))
    other = locate_model(str(dirs[0]))
    with pytest.raises(UserError, match="another model"):
        judge_file(judge, other, answers, out, options)
    seen = []
    found = judge_file(judge, ref, answers, out, options, seen.append)
    assert seen == [3, 5] and len(loaded) == 2
    assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    assert found[0]["feedback"] == "kept" and found[3]["feedback"] != "kept"
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    assert not partial.exists()


def test_drawn_feedback_is_another_for_each_batch_and_goes_on_as_it_began(dirs, file, tmp_path):
    """Each batch drew the same random numbers, and another size of batches was gone on with."""
    [(problem, answer), *_] = answered(1)
    file.write_text(f"{json.dumps({'problem': problem, 'answer': answer})}\n" * 5)
    ref, answers, options = locate_model(str(dirs[1])), load_answers(file), Judging(8, 2, 1.0)
    whole = judge_file(lambda: open_student(ref), ref, answers, tmp_path / "whole.jsonl", options)
    assert len({row["feedback"] for row in whole}) == 5

    def stop(done):
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "judged.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judge_file(lambda: open_student(ref), ref, answers, out, options, stop)
    lines = partial_of(out).read_text().splitlines(keepends=True)
    partial_of(out).write_text("".join(lines[:4]))  # of the second batch one row is there
    other = dataclasses.replace(options, batch_size=3)
    with pytest.raises(UserError, match="--batch-size where tokens are drawn"):
        judge_file(lambda: open_student(ref), ref, answers, out, other)
    seen = []
    found = judge_file(lambda: open_student(ref), ref, answers, out, options, seen.append)
    assert found == whole and seen[0] == 2


def test_what_one_adapter_judged_another_does_not_go_on_with(dirs, file, tmp_path):
    """Of an adapter that belongs to no run nothing was looked at."""
    base, refs = str(dirs[1]), []
    for name, value, scale in (("one", 1.0, 2.0), ("weights", 2.0, 2.0), ("config", 1.0, 3.0)):
        folder = tmp_path / "ad" / "x" / name
        folder.mkdir(parents=True)
        mx.save_safetensors(str(folder / "adapters.safetensors"), {"lora_a": mx.array([value])})
        config = {"model": base, "lora_parameters": {"rank": 1, "scale": scale}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        refs.append(locate_model(base, folder))
    one, *others = refs
    assert one.adapter is not None

    def stop(done):
        raise KeyboardInterrupt

    out, answers = tmp_path / "judged.jsonl", load_answers(file)
    how = Judging(max_tokens=4, batch_size=2)

    def judge(ref, on_progress=stop):
        return judge_file(lambda: pytest.fail("loaded"), ref, answers, out, how, on_progress)

    with pytest.raises(KeyboardInterrupt):
        judge(one)
    for other in (*others, locate_model(base)):
        with pytest.raises(UserError, match="is of another model"):
            judge(other)
    with pytest.raises(KeyboardInterrupt):  # the same one goes on
        judge(one)


def test_rows_of_others_are_left_alone(dirs, file, tmp_path):
    """A file in the place of the rows, a changed row in it, and another process that writes it."""
    ref, out, answers = locate_model(str(dirs[1])), tmp_path / "judged.jsonl", load_answers(file)
    options = Judging(max_tokens=3, batch_size=5)
    partial = partial_of(out)
    partial.write_text("somebody's notes\n")
    with pytest.raises(UserError, match="another file of answers"):
        judge_file(lambda: open_student(ref), ref, answers, out, options)
    assert partial.read_text() == "somebody's notes\n"
    partial.unlink()

    def stop(done):
        if done == 0:
            with pytest.raises(UserError, match="another mlx-fd process is writing this file"):
                judge_file(lambda: open_student(ref), ref, answers, out, options)
        else:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_file(lambda: open_student(ref), ref, answers, out, options, stop)
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    # Without the second row the others would stand beside answers that are not theirs.
    partial.write_text("".join(lines[:2] + lines[3:]))
    seen = []
    judge_file(lambda: open_student(ref), ref, answers, out, options, seen.append)
    assert seen == [1, 5] and out.read_text().splitlines(keepends=True) == lines[1:]


def test_an_answer_longer_than_the_context_is_not_judged(dirs, file, tmp_path):
    with file.open("a") as handle:
        handle.write(json.dumps({"question": "1 + 1 " * 2000, "answer": "2"}) + "\n")
    done = command(dirs[1], "--problems", file, "--out", tmp_path / "judged.jsonl")
    flat = " ".join(done.err.split())
    assert done.status == 2 and f"{file}: row 5: problem and answer have" in flat
    assert "take a smaller --tokens" in flat
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ('{"question": "1?", "answer": "1", "x": "\\ud800"}', "which JSON cannot hold"),
        ('{"question": "1?"}', ":2: no 'answer'"),
        ('{"answer": "1"}', ":2: no 'question'"),
        ('{"question": "1?", "answer": " "}', ":2: 'answer' is empty"),
        ('{"question": "1?", "answer": ["1"]}', ":2: 'answer' is not text but list"),
        ('{"question": "1?", "answer": "1", "feedback": "?"}', ":2: has 'feedback', which"),
        ('{"question": "1?", "answer": "1", "x": NaN}', ":2: 'x' is nan, which JSON cannot hold"),
    ],
)
def test_a_bad_row_is_refused_before_a_model_is_looked_for(line, message, tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": 2}\n' + line + "\n")
    done = command("no-such-model", "--problems", file, "--out", tmp_path / "out.jsonl")
    assert done.status == 2 and message in done.err and f"{file}:2: " in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_files_that_cannot_be_written_are_refused_first(file, tmp_path):
    for out, options, message in (
        (file, ["--overwrite"], "is the file of answers itself"),
        (tmp_path, [], "is a folder"),
        (tmp_path / "none" / "out.jsonl", [], "there is no folder"),
    ):
        done = command("no-such-model", "--problems", file, "--out", out, *options)
        assert done.status == 2 and message in done.err, done.err
    for options, message in (
        (["--problems", file], "go together"),
        (["--problems", file, "--out", "x", "--problem", "1"], "of one answer"),
        (["--answer", "1"], "Missing option '--problem'"),
    ):
        done = command("no-such-model", *options)
        assert done.status == 2 and message in done.err, done.err
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(UserError, match="has no rows"):
        load_answers(empty)
    with pytest.raises(UserError, match="ends in one of"):
        load_answers(tmp_path / "answers.txt")


def test_answers_of_a_table(tmp_path):
    file = tmp_path / "answers.csv"
    file.write_text('question,answer,by\n1 + 1?,"2, I think",Ann\n')
    found = load_answers(file)
    assert (found.problems, found.answers) == (("1 + 1?",), ("2, I think",))
    assert found.rows == ({"question": "1 + 1?", "answer": "2, I think", "by": "Ann"},)
    row = {
        "passage": "It rains.",
        "question": "Why?",
        "choices": ["so", "no"],
        "answer": "B",
    }
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(row))
    asked = "It rains.\n\nWhy?\nA. so\nB. no"
    assert load_answers(file).problems == (asked,) == (load(str(file)).problems[0].question,)


def test_choices_stand_with_every_question_of_a_file_that_letters_answer(tmp_path):
    file = tmp_path / "answers.jsonl"
    row = {"question": "Which?", "A": "red", "B": "blue"}
    rows = [{**row, "answer": answer} for answer in ("It is blue.\n#### B", "A", "no idea")]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert set(load_answers(file).problems) == {"Which?\nA. red\nB. blue"}
    variables = [{"question": "a + b?", "a": 3, "b": 5, "answer": str(n)} for n in (8, 9)]
    file.write_text("".join(json.dumps(one) + "\n" for one in variables))
    assert set(load_answers(file).problems) == {"a + b?"}
    file.write_text(json.dumps({"question": "?", "answer": "1", "image": "x.png"}))
    with pytest.raises(UserError, match="has an image"):
        load_answers(file)
    file.write_text(json.dumps({"question": "?", "answer": "1", "thought": "mine"}))
    with pytest.raises(UserError, match="'thought', which judging would write"):
        load_answers(file, RESERVED)


# The examples


def test_the_script(tiny_run, file, tmp_path, monkeypatch, capsys):
    rows = [{"question": problem, "answer": answer} for problem, answer in answered(3)]
    rows[0]["question"] += "\u2028"  # ends no row
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    script = ROOT / "examples" / "judge_many.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny_run), str(file)])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines if line.startswith(("+", "-"))]
    assert len(scores) == 3 and scores == sorted(scores)
    # A model without a head whose text has no score.
    expert, _ = make_dirs(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), str(expert), str(file)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.count("unreadable  ") == 3
    monkeypatch.setattr(sys, "argv", [str(script), "no-such-run", str(file)])
    with pytest.raises(SystemExit, match="error: there is no model no-such-run"):
        runpy.run_path(str(script), run_name="__main__")


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "loop_and_judge.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    names: dict[str, typing.Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            # Smaller, for the guide's cell learns as much as this one says.
            source = "".join(cell["source"])
            for size, less in (("kd_steps=16", "kd_steps=2"), ("probe_size=8", "probe_size=2")):
                assert (size in source) == ("run_loop(" in source)
                source = source.replace(size, less)
            exec(source, names)
    assert names["run"].done and len(names["judgements"]) == 3
    assert "8/8 episodes" in capsys.readouterr().out


# The divergence in somebody else's training


class Body(nn.Module):
    """Hidden states [B, T, d] and a head that trains, or a tied one."""

    def __init__(self, width: int, vocab: int, *, tied: bool):
        super().__init__()
        mx.random.seed(width)
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = self.embed if tied else nn.Linear(width, vocab)

    def hidden(self, tokens):
        return mx.tanh(self.mix(self.embed(tokens)))

    def logits(self, tokens):
        hidden = self.hidden(tokens)
        return hidden @ self.embed.weight.T if self.head is self.embed else self.head(hidden)


def flat(gradient) -> np.ndarray:
    return np.concatenate([np.array(v).ravel() for _, v in nn.utils.tree_flatten(gradient)])


TOKENS = mx.array(np.random.default_rng(0).integers(0, 50, (3, 9)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_the_cross_entropy(tied, masked):
    model = Body(16, 50, tied=tied)
    targets = mx.roll(TOKENS, -1, axis=1)
    mask = mx.array(np.random.default_rng(1).random((3, 9)) < 0.6) if masked else None
    ignored = targets if mask is None else mx.where(mask, targets, -100)

    def dense(model):
        each = nn.losses.cross_entropy(model.logits(TOKENS), targets)
        return each.mean() if mask is None else (each * mask).sum() / mask.sum()

    expected, slopes = nn.value_and_grad(model, dense)(model)
    for target in (Target.tokens(targets, mask=mask), Target.tokens(ignored)):

        def fused(model, target=target):
            total, count = fused_linear_divergence(model.hidden(TOKENS), model.head, target)
            return total / count

        value, gradient = nn.value_and_grad(model, fused)(model)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        np.testing.assert_allclose(flat(gradient), flat(slopes), rtol=1e-3, atol=1e-6)
        assert np.abs(flat(gradient)).max() > 0.01


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_teacher_is_the_dense_divergence(kind):
    model, teacher = Body(16, 50, tied=False), Body(24, 53, tied=True)
    temperature = 2.0

    def dense(model):
        student, other = (
            z / temperature - mx.logsumexp(z / temperature, axis=-1, keepdims=True)
            for z in (model.logits(TOKENS), teacher.logits(TOKENS)[..., :50])
        )
        p, q = (other, student) if kind == "forward" else (student, other)
        return temperature**2 * (mx.exp(p) * (p - q)).sum(axis=-1).mean()

    def fused(model):
        # The vocabulary is what both heads have: 50 of the teacher's 53 rows.
        target = Target.teacher(
            teacher.hidden(TOKENS), teacher.head, kind=kind, temperature=temperature
        )
        total, count = fused_linear_divergence(model.hidden(TOKENS), model.head, target)
        return total / count

    expected, slopes = nn.value_and_grad(model, dense)(model)
    value, gradient = nn.value_and_grad(model, fused)(model)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    np.testing.assert_allclose(flat(gradient), flat(slopes), rtol=1e-3, atol=1e-5)
    if kind == "forward":
        # Of all its tokens, a top k says the same.
        states = teacher.hidden(TOKENS).reshape(-1, 24)
        top = teacher_top_k(states, teacher.head, k=50, temperature=2.0, vocab=50)
        target = Target.teacher(top, temperature=2.0)
        total, count = fused_linear_divergence(model.hidden(TOKENS), model.head, target)
        assert (total / count).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_target_of_another_length_is_refused():
    model = Body(16, 50, tied=False)
    with pytest.raises(ValueError, match="27 hidden states, but a target for 24 tokens"):
        fused_linear_divergence(model.hidden(TOKENS), model.head, Target.tokens(TOKENS[:, 1:]))
    with pytest.raises(ValueError, match="need its head"):
        target = Target.teacher(model.hidden(TOKENS))
        fused_linear_divergence(model.hidden(TOKENS), model.head, target)


def test_two_runs_that_begin_in_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder() as one, new_folder() as other:
        assert one != other and one.is_dir() and other.is_dir()
        (other / "config.toml").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [other.name]
    # Of one that could not be begun nothing is left, and what was there stays.
    with pytest.raises(UserError), new_folder() as third:
        raise UserError("no such model")
    assert not third.exists() and other.exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with new_folder():
        pass
    assert list(Path().iterdir()) == []
