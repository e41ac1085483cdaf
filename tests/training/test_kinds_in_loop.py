"""Problems with choices and with texts go through every command, as those with numbers do."""

import json
import subprocess
import sys

import pytest

from mlx_fd import open_student
from mlx_fd.problems import arithmetic, load
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.prompts import answer_prompt

SIZES = ["--batch-size", 2, "--probe-size", 2, "--seed", 1]
SHORT = ["--max-answer-tokens", 24, "--max-feedback-tokens", 24, "--max-merge-tokens", 24]


def choice(problem):
    value = int(problem.answer)
    return {"question": problem.question, "choices": [value + 1, value, value + 7], "answer": 1}


def text(problem):
    return {"question": f"{problem.question} Who?", "answer": ["Ann", "Anna"]}


@pytest.fixture(scope="module", params=[choice, text], ids=["choice", "text"])
def run(request, tmp_path_factory):
    """A loop on such problems, the folder it is in, and its kind."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = map(request.param, arithmetic.load("train").problems[:6])
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mlx_fd("loop", "--preset", "tiny", "--problems", folder / "p.jsonl", "--episodes", 4,
                  "--exam-size", 0, *SIZES, *SHORT, "--out", folder / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, request.param


def mlx_fd(*arguments):
    command = [sys.executable, "-m", "mlx_fd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_rows_have_the_kinds_own_answers(run):
    folder, made = run
    rows = [
        json.loads(line) for line in (folder / "run" / "episodes.jsonl").read_text().splitlines()
    ]
    assert {row["reference"] for row in rows} == ({"B"} if made is choice else {"Ann"})
    for row in rows:
        assert row["correct_after"] == (row["final"]["final"] in ("B", "ann", "anna"))
        assert ("\nB. " in row["question"]) is (made is choice)
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["problems"]["kind"] == made.__name__


def test_the_judge_reads_what_the_student_was_trained_on(run):
    folder, _ = run
    (problem, *_) = load(str(folder / "p.jsonl")).problems
    judge = open_student(folder / "run")
    asked = judge.student_lm.tokenizer.decode(list(judge.requests([(problem.question, "B")])[0]))
    assert answer_prompt(problem.question, form_of(problem)) in asked


def test_other_commands_take_them(tmp_path):
    file = tmp_path / "p.jsonl"
    problems = map(choice, arithmetic.load("train").problems[:6])
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    few = ["--problems", file, "--episodes", 2, *SIZES, "--max-answer-tokens", 24]
    distil = tmp_path / "distil"
    done = mlx_fd("distil", "--expert", "tiny", *few, "--out", distil)
    assert done.returncode == 0, done.stderr
    done = mlx_fd("self-distill", "--method", "grpo", "--model", "tiny-student", *few,
                  "--num-generations", 2, "--out", tmp_path / "self")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = mlx_fd("eval", distil, "--problems", file, "--limit", 2, "--max-tokens", 24)
    assert done.returncode == 0, done.stderr
    outputs = (distil / "eval" / "fast" / "outputs.jsonl").read_text().splitlines()
    references = {row.get("reference") for row in map(json.loads, outputs)} - {None}
    assert references == {"B"}
    done = mlx_fd("report", distil)
    assert done.returncode == 0, done.stderr
