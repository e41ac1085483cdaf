"""Runs of models that think: thoughts are kept apart, whatever the models are used for."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from mlx_fd import open_student, run_loop
from mlx_fd.cli.app import cli
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import sample_of
from mlx_fd.feedback.turns import expert_feedback, first_answers, judge, student_feedback
from mlx_fd.models.generation import first_prompt, followup_prompt
from support.loops import assert_same, rows, start
from support.pairs import SMALL, make_plan
from support.thinkers import random_thinkers
from support.tiny import make_model_dir

ON = {"expert_thinking": "on", "student_thinking": "on", "max_thinking_tokens": 5, "episodes": 4}
MARKS = ("<think>", "</think>")


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return random_thinkers(tmp_path_factory.mktemp("pair"))


def plan_of(dirs, **changes):
    return dataclasses.replace(make_plan(*dirs, **changes), vocab=402)


@pytest.fixture(scope="module")
def finished(dirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    plan = plan_of(dirs, **ON)
    start(folder, plan)
    return folder, plan


def texts_of(row):
    feedback = [row["student_feedback"]["text"], (row["expert_feedback"] or {}).get("text", "")]
    answers = [row["answer"]["text"], row["final"]["text"]]
    return [*feedback, *answers, row["merged"], row["revised"], row["critique"]]


def test_thoughts_stand_in_the_row_under_their_own_name(finished):
    written = rows(finished[0])
    assert len(written) == 4
    for row in written:
        assert {"answer", "student_feedback", "expert_feedback"} <= set(row["thoughts"])
        assert set(row["thoughts"]) <= set(row["tokens"])
        assert set(row["closed_thoughts"]) <= set(row["thoughts"])
        assert not any(mark in text for mark in MARKS for text in texts_of(row))
    assert any(row["closed_thoughts"] for row in written)


def test_a_run_without_thoughts_has_no_such_column(dirs, tmp_path):
    start(tmp_path / "off", plan_of(dirs, episodes=2))
    for row in rows(tmp_path / "off"):
        assert not {"thoughts", "closed_thoughts"} & set(row)


def test_one_by_one_without_caches_is_the_same_run(finished, dirs, tmp_path):
    start(tmp_path / "naive", plan_of(dirs, sequential=True, **ON))
    for one, two in zip(rows(finished[0]), rows(tmp_path / "naive"), strict=True):
        for key in ("answer", "thoughts", "merged", "revised", "critique", "final", "tokens"):
            assert one[key] == two[key], key


def test_a_draft_proposes_thoughts_too(dirs, tmp_path):
    for name, tokens in (("plain", 0), ("drafted", 2)):
        changes = {**ON, "episodes": 2, "sequential": True, "speculate": tokens}
        start(tmp_path / name, plan_of(dirs, **changes))
    plain, drafted = rows(tmp_path / "plain"), rows(tmp_path / "drafted")
    accepted = [row.pop("accepted") for row in drafted]
    assert drafted == plain
    assert all("expert_feedback" in one and "student_feedback" not in one for one in accepted)


def test_a_resumed_run_is_the_uninterrupted_one(finished, tmp_path):
    folder, plan = finished
    stopped, answers = tmp_path / "stopped", iter([False, True])
    assert start(stopped, plan, stop=lambda: next(answers)) is None
    assert len(rows(stopped)) == 2
    start(stopped, plan)
    assert_same(folder, stopped)


@pytest.fixture(scope="module")
def used(dirs, tmp_path_factory):
    """A run by the Python API, as whoever uses it finds it."""
    folder = tmp_path_factory.mktemp("used")
    problems = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    file = folder / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    given = {**SMALL, **ON, "episodes": 2, "exam_size": 0, "train_on_test": True}
    expert, student = map(str, dirs)
    run_loop(
        expert,
        student=student,
        problems=file,
        out=folder / "run",
        on_event=lambda event: None,
        **given,
    )
    return folder


def test_the_distilled_student_thinks_as_in_its_run(used):
    answers = [("What is 1 + 2?", "It is 3.")]
    for student, thinks in (
        (open_student(used / "run"), True),
        (open_student(used / "run", thinking=False), False),
    ):
        [found] = student.judge(answers, max_tokens=6)
        assert bool(found.thought) == thinks
        assert not any(mark in found.text for mark in MARKS)


def command(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_feedback_says_what_was_thought(used, dirs):
    asked = ("--problem", "What is 1 + 2?", "--answer", "It is 3.", "--tokens", 6, "--json")
    assert command("feedback", used / "run", *asked)["thought"]
    assert "thought" not in command("feedback", used / "run", "--thinking", "off", *asked)
    assert "thought" not in command("feedback", dirs[1], *asked)
    more = ("--thinking", "on", "--max-thinking-tokens", 3)
    assert command("feedback", dirs[1], *more, *asked)["thought"]


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_an_evaluation_keeps_thoughts_apart(used, thinking):
    source = ("--problems", used / "p.jsonl", "--limit", 2, "--cache", used / "cache")
    both = ("--thinking", thinking, "--expert-thinking", thinking)
    command(
        "eval", used / "run", *source, *both, "--out", used / thinking, "--json", "--max-tokens", 6
    )
    lines = (used / thinking / "outputs.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert ("answer" in row.get("thoughts", {})) == (thinking == "on")
        assert not any(mark in text for mark in MARKS for text in row["turns"].values())


def test_self_distillation_learns_after_its_thoughts(used, dirs):
    words = ("--model", dirs[1], "--problems", used / "p.jsonl", "--out", used / "self")
    sizes = {"episodes": 2, "probe-size": 2, "batch-size": 2, "max-answer-tokens": 6}
    given = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    thinks = ("--student-thinking", "on", "--max-thinking-tokens", 5, "--num-generations", 2)
    command(
        "self-distill",
        "--method",
        "opsd-reference",
        *words,
        *given,
        *thinks,
        "--json",
        "--train-on-test",
    )
    attempts = (used / "self" / "attempts.jsonl").read_text().splitlines()
    for row in map(json.loads, attempts):
        assert row["thought"] and not any(mark in row["text"] for mark in MARKS)
        assert len(row["tokens"]) <= 6
        assert row["logprob_gap"] < 1e-2


def test_a_run_that_thinks_has_a_report(used):
    result = CliRunner().invoke(cli, ["report", str(used / "run"), "--out", str(used / "r.html")])
    assert result.exit_code == 0, result.output
    assert (used / "r.html").stat().st_size


def judged_by(dirs, **changes):
    """A pair, its options, and an episode after step 2."""
    plan = plan_of(dirs, **changes)
    pair, options = open_pair(plan), plan.config.generation
    quiet = lambda step, count: None  # noqa: E731
    answered = first_answers(pair, plan.problems[:2], options, 0, quiet)
    students = student_feedback(pair, answered, options, 0, quiet)
    experts = expert_feedback(pair, answered, options, 0, quiet)
    return pair, plan.config, judge(answered, students, dict(enumerate(experts)))


@pytest.mark.parametrize(("expert", "student"), [("on", "on"), ("on", "off"), ("off", "on")])
def test_the_student_learns_feedback_after_what_it_will_read(dirs, expert, student):
    changes = {**ON, "expert_thinking": expert, "student_thinking": student}
    pair, config, judged = judged_by(dirs, **changes)
    decode = pair.student_lm.tokenizer.decode
    for one in judged:
        sample = sample_of(pair, one, config.losses)
        assert sample.target == one.expert.feedback.tokens
        prompt = decode(list(sample.prompt))
        # The answer's thought is gone; what stands before the feedback is the student's to say.
        assert prompt.count("<think>") == 1
        thought = prompt.partition("<think>\n")[2].partition("\n</think>\n\n")[0]
        assert prompt.endswith("</think>\n\nScore:")
        assert bool(thought) == (expert == student == "on")
        assert one.student.usage.thoughts.keys() == (
            {"student_feedback"} if student == "on" else set()
        )


def test_thoughts_are_learned_only_where_that_is_asked_for(dirs):
    changes = {**ON, "score_at": "feedback", "distil_thoughts": True}
    pair, config, judged = judged_by(dirs, **changes)
    decode = pair.student_lm.tokenizer.decode
    plain = dataclasses.replace(config.losses, distil_thoughts=False)
    for one in judged:
        sample, without = sample_of(pair, one, config.losses), sample_of(pair, one, plain)
        assert decode(list(sample.prompt)).endswith("<|im_start|>assistant\n<think>\n")
        assert (*sample.prompt, *sample.target) == (*without.prompt, *without.target)
        assert sample.target[-len(without.target) :] == without.target
        assert "</think>\n\nScore:" in decode(list(sample.target))


def test_distilling_thoughts_needs_models_that_think():
    for given in (
        {},
        {"expert_thinking": "on", "student_thinking": "on", "score_at": "prompt"},
        {"score_at": "feedback"},
    ):
        with pytest.raises(UserError, match="distil_thoughts needs"):
            override(Config(), {"distil_thoughts": True, **given}, "test")


def test_the_templates_own_switch_is_left_alone(dirs):
    from mlx_fd.models.loading import load
    from mlx_fd.models.tokenizer import open_template

    with pytest.raises(UserError, match="--thinking"):
        open_template(dirs[0], {"enable_thinking": True})
    loaded = load(dirs[0])
    for prompt in (first_prompt(loaded, "Hi"), followup_prompt(loaded, "Hi")):
        text = loaded.tokenizer.decode(list(prompt))
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_model_that_cannot_think_is_refused_before_it_is_loaded(tmp_path):
    from mlx_fd.runs.plan import make_plan as checked_plan

    expert = make_model_dir(tmp_path / "expert", hidden=16, heads=2, kv_heads=1, intermediate=32)
    rows_ = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    config = override(
        Config(),
        {
            **{"expert": str(expert), "student": str(expert), "expert_thinking": "on"},
            **{"problems": str(tmp_path / "p.jsonl"), "episodes": 2, "probe_size": 2},
        },
        "test",
    )
    with pytest.raises(UserError, match="does not think"):
        checked_plan(config)
    with pytest.raises(UserError, match="does not think"):
        open_student(str(expert), thinking=True)
