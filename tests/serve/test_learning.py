"""Learning that goes on: what the expert had to answer is kept, learned from, and served."""

import asyncio
import json
import os
import shutil
import signal
import time

import pytest

from mlx_fd import problems, runs
from mlx_fd.cli import cli
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.models.student import ADAPTER_WEIGHTS, HEADS
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.serve.kept import CORRECTION, EXPERT, Kept
from mlx_fd.training.planning import new_plan
from mlx_fd.training.session import open_run
from support.serving import ask, exchange, post, serving, tiny_run

ASKED = 8
SMALL = {"batch_size": 4, "losses": ["score"], "gate": "always", "answers_by": "student"}
SMALL |= {"exam_size": 0, "probe_size": 4, "score_rate": 0.02, "trigger": "always"}


def test_what_was_passed_on_is_learned_and_passed_on_less(tmp_path, monkeypatch):
    """The whole circle: serve, keep, correct, learn, take the new weights, pass on less."""
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    # A head that knows nothing yet: every score is 0, below the threshold.
    first, second = tiny_run(tmp_path / "first", strength=0.0, **SMALL), tmp_path / "second"
    current, kept = tmp_path / "current", tmp_path / "kept.jsonl"
    current.symlink_to(first)
    drawn = problems.load("arithmetic", "test").problems[:ASKED]
    rule = ("--score", "head", "--threshold", "0.02")
    options = ("--expert", "tiny", *rule, "--keep", str(kept))
    with serving(tmp_path, current, *options) as server:

        async def replies():
            async with server.client() as client:
                return await asyncio.gather(
                    *(ask(client, one.question, model="cascade") for one in drawn)
                )

        def answered(replies):
            by = [reply.mlx_fd["answered_by"] for reply in replies]
            texts = [reply.choices[0].message.content for reply in replies]
            right = [
                is_right(read_final(text, one), one) for text, one in zip(texts, drawn, strict=True)
            ]
            return by.count("expert"), sum(right)

        before, right_before = answered(asyncio.run(replies()))
        assert before == ASKED
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        assert {row["question"] for row in rows} == {one.question for one in drawn}
        assert {row["kept"] for row in rows} == {"expert"}

        correction = {"problem": drawn[0].question, "answer": drawn[0].solution}
        assert said(server, "/v1/corrections", correction)[0] == 200
        status, error = said(server, "/v1/corrections", {**correction, "answer": "no number"})
        assert (status, error["error"]["param"]) == (400, "answer")
        assert kept.read_text().count("correction") == 1

        command = ["loop", "--problems", str(kept), "--continue", str(current)]
        cli([*command, "--out", str(second), "--quiet"], standalone_mode=False)
        config = (second / runs.CONFIG).read_text()
        assert f"episodes = {ASKED - 1}" in config  # one of a fifth is held out
        begun = (second / runs.BEGUN / "adapters.safetensors").read_bytes()
        assert begun == (first / "checkpoints" / "best" / "adapters.safetensors").read_bytes()

        status, error = said(server, "/admin/reload", {"student": str(tmp_path / "nowhere")})
        assert status == 400
        assert "goes on with what it has" in error["error"]["message"]
        current.unlink()
        # Of so few problems the one that is held out says little of which is best.
        current.symlink_to(second / "checkpoints" / "last")
        os.kill(server.process.pid, signal.SIGHUP)
        deadline = time.monotonic() + 60
        while not (taken := [line for line in server.lines() if "checkpoint" in line]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert taken[-1]["checkpoint"].startswith(str(second))
        after, right_after = answered(asyncio.run(replies()))
    assert after < before
    # What stays with the student is right no less often than the student is alone.
    assert right_before == ASKED
    assert right_after >= ASKED // 2


def test_an_answer_that_a_stop_text_cut_is_not_kept(tmp_path):
    """Its first step was kept as the whole solution, with what that comes to as the answer."""
    run, kept = tiny_run(tmp_path / "run", strength=0.0, **SMALL), tmp_path / "kept.jsonl"
    question = problems.load("arithmetic", "test").problems[0].question
    rule = ("--score", "head", "--threshold", "0.02")
    options = ("--expert", "tiny", *rule, "--keep", str(kept))
    with serving(tmp_path, run, *options) as server:

        async def replies():
            async with server.client() as client:
                cut = await ask(client, question, model="cascade", stop=["\n"])
                before = kept.read_text()
                # A stop text that never comes cuts nothing.
                return cut, before, await ask(client, question, model="cascade", stop=["never"])

        cut, before, whole = asyncio.run(replies())
    assert cut.mlx_fd["answered_by"] == "expert"
    assert read_final(cut.choices[0].message.content, Problem("", question, "", "")) is not None
    assert before == ""
    [row] = [json.loads(line) for line in kept.read_text().splitlines()]
    assert row["solution"] == whole.choices[0].message.content


def said(server, path, content):
    """Status and content of a reply."""
    found = asyncio.run(exchange(server.port, post(path, json.dumps(content).encode())))
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_kept_file_is_bounded_and_the_users_own(tmp_path):
    path = tmp_path / "kept.jsonl"
    kept = Kept(path, 3, "number")
    for number in range(5):
        assert kept.add(f"How much is {number} and 1?", f"#### {number + 1}", EXPERT)
    assert [row["question"][12] for row in kept.rows()] == ["2", "3", "4"]
    assert not kept.add("How much is  3 and 1?", "#### 9", EXPERT)
    assert kept.add("How much is 3 and 1?", "It is 4.\n#### 4", CORRECTION)
    assert [row["kept"] for row in kept.rows()] == ["expert", "expert", "correction"]
    assert not kept.add("Why?", "I do not know", EXPERT)
    # What a loop reads is what was kept.
    loaded = problems.load(str(path)).problems
    assert [(one.question, one.answer) for one in loaded][-1] == ("How much is 3 and 1?", "4")
    assert isinstance(loaded[0], Problem)
    with path.open("a") as file:
        file.write("half a li")
    assert len(kept.rows()) == 3
    path.unlink()
    assert kept.rows() == []
    assert kept.add("Again, 1 and 1?", "#### 2", EXPERT)


CHOICES = "Which is red?\nA. sky\nB. blood"


@pytest.mark.parametrize(
    ("kind", "kept", "golds"),
    [
        (
            "number",
            [
                ("How many are left?", "47 + 2 = 49, 49 - 16 = 33. The answer is 33."),
                ("How many are there?", "First 47 + 2.\n\n**Answer: 49**"),
                ("How much is a half and 3?", "The answer is \\boxed{3.5}."),
                ("How many cost that?", "Step 1: <<6*200=1200>>1200\n#### 1,200 eggs"),
            ],
            ["33", "49", "7/2", "1200"],
        ),
        (
            "math",
            [
                ("Solve x^2 = 3.", "It is \\boxed{\\sqrt{3}}."),
                ("How much is 1 and 1?", "#### 2"),
                ("Where?", "#### (1, 2)"),
            ],
            [r"\sqrt{3}", "2", "(1,2)"],
        ),
        (
            "text",
            [(f"When was house {n} built?", f"In 19{n}0.\n#### 19{n}0") for n in range(4)]
            + [("Which city?", "It is\n#### **Paris**")],
            ["1900", "1910", "1920", "1930", "paris"],
        ),
        (
            "choice",
            [
                (CHOICES, "Blood is red.\n#### B"),
                # The same words, and other choices: another question.
                ("Which is red?\nA. ruby\nB. grass\nC. sky", "The answer is A."),
            ],
            ["B", "A"],
        ),
    ],
)
def test_what_is_kept_is_what_a_loop_reads(tmp_path, kind, kept, golds):
    """Replies were kept as answers: prose was refused or a formula, and years became numbers."""
    path = tmp_path / "kept.jsonl"
    file = Kept(path, 10, kind)
    assert all(file.add(*one, EXPERT) for one in kept)
    assert not any(file.add(*one, EXPERT) for one in kept)
    loaded = problems.load(str(path), kind=kind).problems
    assert [(one.kind, one.question, one.answer, one.solution) for one in loaded] == [
        (kind, question, gold, reply) for (question, reply), gold in zip(kept, golds, strict=True)
    ]
    assert all(is_right(read_final(one.solution, one), one) for one in loaded)


@pytest.mark.parametrize(
    ("kind", "question", "reply"),
    [
        ("text", "Which one?", "#### none"),
        ("choice", "Which is red?", "#### B"),
        # A loop would list the choices below the rest.
        ("choice", f"{CHOICES}\nName one.", "#### B"),
        # B, or the text of C?
        ("choice", "Which?\nA. C\nB. A\nC. B", "#### B"),
    ],
)
def test_what_no_loop_would_read_is_not_kept(tmp_path, kind, question, reply):
    file = Kept(tmp_path / "kept.jsonl", 10, kind)
    assert file.final(question, reply) is None
    assert not file.add(question, reply, CORRECTION)
    assert file.rows() == []


@pytest.mark.parametrize(("kind", "says"), [("code", "tests"), ("none", "kind none")])
def test_answers_that_nothing_can_be_learned_from_are_not_kept(tmp_path, kind, says):
    with pytest.raises(UserError, match=f"^--keep .*{says}.*leave --keep out$"):
        Kept(tmp_path / "kept.jsonl", 10, kind)
    assert not (tmp_path / "kept.jsonl").exists()


def test_a_file_of_an_earlier_version_is_read_and_appended_to(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text(row("How much is 1 and 1?", "It is 2.\n#### 2", kept=EXPERT, id="kept-1"))
    file = Kept(path, 10, "number")
    assert not file.add("How much is 1  and 1?", "#### 3", EXPERT)
    assert file.add("How much is 1 and 3?", "The answer is 4.", EXPERT)
    loaded = problems.load(str(path)).problems
    assert [(one.answer, one.solution) for one in loaded] == [
        ("2", "It is 2.\n#### 2"),
        ("4", "The answer is 4."),
    ]


MINE = '{"question": "A?", "answer": "#### 1"}\r\n\n{"problem": "B?",  "answer": "#### 2",}\n'
MINE += "# \u2028\n"


def row(question, answer, **more):
    return json.dumps({"question": question, "answer": answer, **more}) + "\n"


@pytest.mark.parametrize(
    ("before", "added", "stays", "kept"),
    [
        # A file of the user's that is longer than what a server keeps.
        (MINE * 5, ("New?", "#### 3", EXPERT), MINE * 5, ["New?"]),
        (MINE.rstrip(), ("New?", "#### 3", EXPERT), MINE.rstrip() + "\n", ["New?"]),
        # A question of the user's is answered there, under any name that a question may have.
        (MINE, ("A?", "#### 3", EXPERT), MINE, []),
        (MINE, ("A?", "#### 3", CORRECTION), MINE, ["A?"]),
        ('{"problem": "C ?"}\n', ("C  ?", "#### 3", EXPERT), '{"problem": "C ?"}\n', []),
        # The place of a kept one is taken, and the oldest goes; what is between stays.
        (
            row("D?", "#### 1", kept=EXPERT) + MINE + row("E?", "#### 2", kept=EXPERT),
            ("D?", "#### 3", CORRECTION),
            MINE + row("E?", "#### 2", kept=EXPERT),
            ["E?", "D?"],
        ),
        (
            MINE + row("D?", "#### 1", kept=EXPERT) + row("E?", "#### 2", kept=CORRECTION) + MINE,
            ("New?", "#### 3", EXPERT),
            MINE + row("E?", "#### 2", kept=CORRECTION) + MINE,
            ["E?", "New?"],
        ),
        # What is kept is what a server says of it, not what a user's own column has.
        (row("D?", "#### 1", kept=True), ("D?", "#### 3", CORRECTION), None, ["D?"]),
    ],
)
def test_no_line_of_the_users_own_is_changed(tmp_path, before, added, stays, kept):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(before.encode())
    path.chmod(0o640)
    file = Kept(path, 2, "number")
    is_new = file.add(*added)
    assert [one["question"] for one in file.rows()] == kept
    found = path.read_bytes().decode()
    stays = before if stays is None else stays
    assert found.startswith(stays)
    assert found.count("\n") == stays.count("\n") + is_new
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_kept_in_is_refused_at_the_start(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, says in (
        ("nowhere/kept.jsonl", "cannot be kept there .No such file"),
        ("link.jsonl", "not a regular file"),
        ("folder.jsonl", "not a regular file"),
    ):
        with pytest.raises(UserError, match=says):
            Kept(tmp_path / name, 3, "number")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--expert", "tiny"), "corrections only (the student is no run"),
        ((), "corrections only (there is no expert)"),
    ],
)
def test_a_server_says_what_it_keeps_and_what_it_could_not(tmp_path, options, says):
    folder = tmp_path / "folder"
    folder.mkdir()
    given = ("--keep", str(folder / "kept.jsonl"), *options)
    correction = {"problem": "How much is 1 and 1?", "answer": "#### 2"}
    with serving(tmp_path, "tiny-student", *given) as server:
        assert server.said["kept"].startswith(says)
        assert said(server, "/v1/corrections", correction)[0] == 200
        shutil.rmtree(folder)
        status, error = said(server, "/v1/corrections", correction)
        assert (status, error["error"]["code"]) == (503, "not_kept")
        assert "Whoever runs it finds the reason" in error["error"]["message"]
        assert [line["error"] for line in server.lines() if line["event"] == "not_kept"]


def test_a_run_that_does_not_fit_is_not_gone_on_with(tmp_path):
    other = tiny_run(tmp_path / "other", lora_rank=2)
    for options, says in (
        (("--continue", str(tmp_path)), "no run directory"),
        (("--continue", str(other), "--lora-rank", "4"), "lora_rank = 2"),
    ):
        with pytest.raises(UserError, match=says):
            cli(["loop", *options, "--out", str(tmp_path / "new")], standalone_mode=False)
    assert not (tmp_path / "new").exists()


def test_an_earlier_run_may_go_on_or_go_while_a_new_one_begins(tmp_path):
    """What the new run keeps is what it loaded, whatever ``best`` is by then."""
    first, second = tiny_run(tmp_path / "first", **SMALL), tmp_path / "second"
    weights = [first / "checkpoints" / "best" / name for name in (ADAPTER_WEIGHTS, HEADS)]
    wanted = [path.read_bytes() for path in weights]
    given = {**SMALL, "expert": "tiny", "student": "tiny-student", "problems": "arithmetic"}
    given |= {"continue_from": str(first), "episodes": 4, "score_at": "prompt"}
    given |= {"lora_rank": 4, "lora_scale": 3.0}
    plan = new_plan(second, override(Config(), given, "test"))
    run = open_run(second, plan, lambda event: None, new=True)
    shutil.rmtree(first)
    assert run(lambda: True) is None
    assert [(second / runs.BEGUN / path.name).read_bytes() for path in weights] == wanted
