"""Programs that models write: what they may do, and what becomes of those that mean harm."""

import json
import os

import pytest

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, execution, load
from mlx_fd.problems.kinds import KINDS, is_right, read_final
from mlx_fd.problems.kinds.code import block_of, program_of
from support.shell import shell

HUMAN_EVAL = {
    "task_id": "HumanEval/1",
    "prompt": "from typing import List\n\ndef half(n: int) -> int:\n    return n // 2\n\n\n"
    'def total(xs: List[int]) -> int:\n    """ The sum of the halves. """\n',
    "canonical_solution": "    return sum(half(x) for x in xs)\n",
    "test": "def check(candidate):\n    assert candidate([2, 4]) == 3\n",
    "entry_point": "total",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}


@pytest.fixture
def allowed(monkeypatch):
    """Programs may be run, for a second at most."""
    monkeypatch.setattr(execution, "SECONDS", 1)
    monkeypatch.setattr(execution, "_permission", execution._Permission(given=True))
    execution.passes.cache_clear()


def fenced(code):
    return f"Here it is:\n\n```python\n{code}\n```\nThat is all."


def only(tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (problem,) = load(str(tmp_path / "p.jsonl")).problems
    return problem


def test_humaneval_is_read_and_judged(tmp_path, allowed):
    problem = only(tmp_path, HUMAN_EVAL)
    assert (problem.kind, problem.id) == ("code", "HumanEval/1")
    assert problem.question == HUMAN_EVAL["prompt"]
    assert problem.answer.endswith("check(total)")
    for code, right in (
        ("def total(xs: List[int]) -> int:\n    return sum(half(x) for x in xs)", True),
        (HUMAN_EVAL["prompt"] + HUMAN_EVAL["canonical_solution"], True),
        ("def total(xs):\n    return 0", False),
        ("def other(xs):\n    return 3", False),
    ):
        assert is_right(read_final(fenced(code), problem), problem) is right, code
    # What goes on where the question ends, without a word of it.
    assert is_right(read_final(fenced(HUMAN_EVAL["canonical_solution"]), problem), problem)
    assert is_right(read_final(problem.solution, problem), problem)


def test_mbpp_is_read_and_judged(tmp_path, allowed):
    problem = only(tmp_path, MBPP)
    assert problem.question.startswith("Write a function to add two numbers.\n\nYour code should")
    assert "assert add(-1, 1) == 0" in problem.question
    assert is_right(read_final(problem.solution, problem), problem)
    assert not is_right(read_final(fenced("def add(a, b):\n    return a"), problem), problem)
    sanitized = {"task_id": 2, "prompt": MBPP["text"], "code": MBPP["code"],
                 "test_imports": ["import math"], "test_list": MBPP["test_list"]}  # fmt: skip
    assert only(tmp_path, sanitized).answer == problem.answer


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        (
            "```python\ndef f():\n    pass\n```\nUse it:\n```python\nf()\n```",
            "def f():\n    pass\n",
        ),
        ("First:\n```python\ndef f(): 1\n```\nBetter:\n```python\ndef f(): 2\n```", "def f(): 2\n"),
        ("```bash\nls\n```", None),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("def f( is how it begins.", None),
        ("I do not know.", None),
        ("<think>```python\nx = 1\n```</think>```python\nx = 2\n```", "x = 2\n"),
        ("", None),
    ],
)
def test_the_program_in_a_reply(reply, code):
    assert block_of(reply) == code


SOLUTION = "```python\ndef add(a, b):\n    return a + b\n```\n"


@pytest.mark.parametrize(
    "reply",
    [
        SOLUTION,
        f"{SOLUTION}Tests:\n```python\ndef test_add():\n    assert add(1, 1) == 3\n```",
        "```python\ndef plus(a, b):\n    return a + b\n```\nand\n"
        "```python\ndef add(a, b):\n    return plus(a, b)\n```",
        "1. First:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
        '```python title="a.py"\ndef add(a, b):\n    return a + b\n```',
        "```python\ndef add(a, b):\n    return a - b\n```\nNo:\n" + SOLUTION,
        SOLUTION + "```python\nprint(add(1, 2))\n```",
    ],
)
def test_the_block_that_the_tests_call_is_the_solution(tmp_path, allowed, reply):
    problem = only(tmp_path, MBPP)
    assert is_right(read_final(reply, problem), problem)


HARMLESS = {
    "does nothing": ("pass", True),
    "imports": ("import collections, heapq, itertools, json, math, random, re, typing", True),
    "its folder is empty and its own": (
        "import os, shutil\nassert os.listdir('.') == []\nopen('x', 'w').write('1')\n"
        "shutil.rmtree(os.getcwd(), ignore_errors=True)",
        True,
    ),
    "a clean environment": (
        "import os\nassert {name for name in os.environ if not name.endswith('THREADS')}"
        " <= {'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE'}",
        True,
    ),
    "is found by what looks for its module": (
        "from __future__ import annotations\nimport dataclasses, pickle\n@dataclasses.dataclass\n"
        "class Point:\n    x: int = 1\nassert pickle.loads(pickle.dumps(Point())) == Point()",
        True,
    ),
    "fails": ("assert 1 + 1 == 3", False),
    "no Python": ("def", False),
    "ends before the tests": ("import sys\nsys.exit(0)", False),
    "ends the process": ("import os\nos._exit(0)", False),
    "forks": ("import os\nwhile True: os.fork()", False),
    "10 GB of memory": ("x = bytearray(10 << 30)", False),
    "a large file": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", False),
    "no end": ("while True: pass", False),
    "no end of output": ("while True: print('x' * 10_000)", False),
    "recursion": ("def f(): f()\nf()", False),
    "sleeps": ("import time\ntime.sleep(600)", False),
    "its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nbytearray(4 << 30)",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_no_program_does_harm(name, allowed):
    program, passes = HARMLESS[name]
    assert execution.passes(program) is passes


@pytest.mark.parametrize("name", ["numpy", "scipy.linalg"])
def test_what_begins_threads_elsewhere_can_be_imported(monkeypatch, allowed, name):
    pytest.importorskip(name)
    # The default, and four times as long by the clock: a busy machine reads it slowly.
    monkeypatch.setattr(execution, "SECONDS", 8)
    product = "import numpy as np\nassert (np.ones((300, 300)) @ np.ones((300, 300)) == 300).all()"
    assert execution.passes(f"import {name}\n{product}")


# As EvalPlus has its tests.
EVAL_PLUS = """
import numpy as np

def assertion(out, expected, atol):
    if atol:
        assert np.allclose(out, expected, rtol=1e-07, atol=atol)
    else:
        assert out == expected

def check(candidate):
    for inputs, expected in zip([[[2, 4]], [[6]]], [3, 3]):
        assertion(candidate(*inputs), expected, 1e-6)
"""


def test_tests_that_need_numpy_are_passed_by_what_is_right(tmp_path, monkeypatch, allowed):
    monkeypatch.setattr(execution, "SECONDS", 8)
    problem = only(tmp_path, {**HUMAN_EVAL, "test": EVAL_PLUS})
    assert is_right(read_final(problem.solution, problem), problem)
    assert not is_right(read_final(fenced("def total(xs):\n    return 0"), problem), problem)


@pytest.mark.parametrize(
    "guarded",
    ["print(add(int(input()), 1))", "import unittest\n    unittest.main()",
     "import sys\n    sys.exit(0)", "assert False"],
)  # fmt: skip
def test_what_a_reply_has_for_when_it_is_run_by_itself_is_left_alone(tmp_path, allowed, guarded):
    problem = only(tmp_path, MBPP)
    code = "def add(a, b):\n    return a {} b\n\nif __name__ == '__main__':\n    " + guarded
    assert is_right(read_final(fenced(code.format("+")), problem), problem)
    assert not is_right(read_final(fenced(code.format("-")), problem), problem)


def test_tests_below_the_same_words_are_run(tmp_path, allowed):
    tests = (
        "def check_sum():\n    assert add(1, 2) == 3\n\nif __name__ == '__main__':\n    check_sum()"
    )
    problem = only(tmp_path, {"prompt": "Add.", "test": tests, "canonical_solution": MBPP["code"]})
    assert is_right(read_final(problem.solution, problem), problem)
    assert not is_right(read_final(fenced("def add(a, b):\n    return a"), problem), problem)


def test_what_a_reply_imports_from_the_future_comes_first(tmp_path, allowed):
    problem = only(tmp_path, HUMAN_EVAL)
    body = "def total(xs: List[int]) -> int:\n    return sum(half(x) for x in xs)"
    reply = fenced(f"from __future__ import annotations\n{body}")
    assert is_right(read_final(reply, problem), problem)


def test_reference_solutions_that_fail_are_counted_and_refused_where_all_do(tmp_path, allowed):
    wrong = {**MBPP, "task_id": 3, "code": "def add(a, b):\n    return a - b"}
    without = {name: MBPP[name] for name in MBPP if name != "code"} | {"task_id": 4}
    path = tmp_path / "p.jsonl"
    for rows, tried, failing in (
        ([MBPP, wrong, without], 2, ("3",)),
        ([MBPP], 1, ()),
        ([without], 0, ()),
        ([{**MBPP, "task_id": place} for place in range(1000)], 16, ()),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = load(str(path))
        assert (found.tried, found.failing) == (tried, failing)
        notes = [note for note in found.notes if "reference solutions" in note]
        assert bool(notes) == bool(failing)
        if failing:
            assert notes[0].startswith(f"1 of 2 reference solutions of {path} that were tried fail")
    path.write_text(json.dumps(wrong))
    with pytest.raises(
        UserError, match=r"no reference solution passes .* \(1 tried, the first is 3"
    ):
        load(str(path))


@pytest.fixture(scope="module")
def trial():
    """What programs can do on this machine that they should not, and what the user is told."""
    before, execution._permission = execution._permission, execution._Permission()
    try:
        execution.allow()
        return execution._permission.not_isolated, execution.isolation_note()
    finally:
        execution._permission = before


def test_what_is_not_kept_from_programs_is_said(trial):
    missing, note = trial
    assert all(one in note for one in missing)
    assert ("NOT kept from them" in note) is bool(missing)


def test_what_the_trial_says_is_so(trial, allowed, tmp_path):
    missing, _ = trial
    theirs = tmp_path / "secret"
    theirs.write_text("ours")
    for what, program in {
        "files that you can read": f"open({str(theirs)!r}).read()",
        "files that you can write": f"open({str(theirs)!r}, 'w').write('')",
        "the network": "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "signals to other processes": f"import os; os.kill({os.getpid()}, 0)",
        "further processes": "import subprocess; subprocess.run(['true'], check=True)",
    }.items():
        assert what in missing or not execution.passes(program), what
    assert theirs.read_text() == "ours" or "files that you can write" in missing


def test_nothing_runs_that_nobody_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "_permission", execution._Permission())
    problem = Problem("p", "?", "", "assert True", "code")
    marked = tmp_path / "ran"
    with pytest.raises(UserError, match="--allow-code-execution"):
        is_right(f"open({str(marked)!r}, 'w')", problem)
    with pytest.raises(UserError, match="--allow-code-execution"):
        only(tmp_path, MBPP)
    assert not marked.exists()


def test_commands_ask_before_anything_is_loaded(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(MBPP) + "\n" + json.dumps(MBPP | {"task_id": 3}) + "\n")
    for command in (
        ["eval", "owner/is-not-here"],
        ["loop", "--expert", "owner/is-not-here", "--student", "owner/is-not-here"],
        ["self-distill", "--method", "grpo", "--model", "owner/is-not-here"],
        ["distil", "--expert", "owner/is-not-here", "--student", "owner/is-not-here"],
    ):
        done = shell(*command, "--problems", file, cwd=tmp_path)
        assert done.status == 2
        assert "has to be said anew each time" in done.flat, done
        assert "is-not-here" not in done.flat


def test_each_program_is_what_it_should_be(allowed):
    problem = Problem("p", "def f(x):\n    '''One more.'''\n", "", "check(f)", "code")
    assert program_of("    return x + 1", problem).startswith("def f(x):")
    assert program_of("def f(x):\n    return x + 1", problem).startswith("\ndef f(x):\n    return")
    assert KINDS["code"].read("```python\n```", problem, "auto") is None
