"""The embedded pair through the whole loop: what its preset asks for is what happens."""

import dataclasses
import json
from collections import Counter

import mlx.core as mx
import pytest

from mlx_fd.config import Config, override, preset
from mlx_fd.evaluation.exam import exam_questions, examine
from mlx_fd.feedback.own_solutions import solve_alike
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import solution_of
from mlx_fd.feedback.stages import StudentFeedback
from mlx_fd.feedback.turns import (
    answer,
    expert_feedback,
    first_answers,
    judge,
    merge_and_revise,
    student_feedback,
)
from mlx_fd.models.generation import first_prompt
from mlx_fd.problems import Problem, prompts
from mlx_fd.runs import read_lines
from mlx_fd.runs.plan import make_plan
from support.pages import check_charts
from support.pairs import without_seconds
from support.shell import shell


def quiet(step, tokens):
    pass


@pytest.fixture(scope="module")
def config() -> Config:
    return override(preset("tiny"), {"episodes": 8, "batch_size": 8, "exam_size": 8}, "test")


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config)


@pytest.fixture(scope="module")
def pair(plan):
    return open_pair(plan)


@pytest.fixture(scope="module")
def judged(pair, plan, config):
    options = config.generation
    answered = first_answers(pair, plan.problems, options, 1, quiet)
    students = student_feedback(pair, answered, options, 2, quiet)
    experts = expert_feedback(pair, answered, options, 3, quiet)
    return judge(answered, students, dict(enumerate(experts)))


def test_the_student_writes_the_first_answers_and_the_expert_judges_them(
    pair, plan, config, judged
):
    own = answer(pair.student_lm, plan.problems, config.generation, 1, quiet, keep=False)
    answered = [one.answered for one in judged]
    assert [one.answer for one in answered] == [one.answer for one in own]
    assert not all(one.is_correct for one in answered)
    for one in judged:
        assert one.expert.feedback.written_score is not None
        if one.answered.is_correct:
            assert one.expert.feedback.written_score > 0
        # The student's tokens stand in the expert's conversation, one by one.
        begun = first_prompt(pair.expert, prompts.answer_prompt(one.problem.question))
        tokens = one.answered.answer.tokens
        assert one.answered.prompt[: len(begun) + len(tokens)] == (*begun, *tokens)


def test_the_examination_is_of_the_student_as_it_writes_in_the_run(pair, config):
    """It solved with the expert's repetition penalty, and gave its feedback without any."""
    exam = exam_questions(config)[:4]

    def taken(**penalties):
        found = Counter()
        options = dataclasses.replace(config.generation, **penalties)
        results = examine(pair, exam, options, lambda step, count: found.update({step: count}))
        return results, found

    usual = taken()
    assert taken(expert_repetition_penalty=2.0) == usual
    assert taken(student_repetition_penalty=2.0) != usual


def test_the_score_head_reads_the_end_of_the_feedback(pair, judged, monkeypatch):
    monkeypatch.setattr(
        pair.student.score_head, "weight", mx.random.normal(pair.student.score_head.weight.shape)
    )
    options = preset("tiny").generation
    answered = [one.answered for one in judged]
    for one, student in zip(
        answered, student_feedback(pair, answered, options, 2, quiet), strict=True
    ):
        tokens = mx.array([[*one.prompt, *student.feedback.tokens[:-1]]])
        whole = pair.student_lm.view.forward(tokens).final[0, -1]
        assert student.head_score == pytest.approx(pair.student.score(whole).item(), abs=1e-4)


def test_its_own_solutions_bear_a_students_verdicts_out_or_contradict_them(pair, config, judged):
    answered, students = [one.answered for one in judged], [one.student for one in judged]
    problems = [one.problem for one in judged]

    def finals(of, temperature):
        how = dataclasses.replace(config.generation, answer_temperature=temperature)
        found = answer(pair.student_lm, of, how, 4, quiet, keep=False)
        return [one.answer.final for one in found], [len(one.answer.tokens) for one in found]

    greedy, lengths = finals(problems, 0.0)
    drawn, more = finals(problems * 2, 1.0)
    assert solve_alike(pair, answered, students, config.generation, 0, 4, quiet) == students
    found = solve_alike(pair, answered, students, config.generation, 3, 4, quiet)
    for place, (before, one, student) in enumerate(zip(students, answered, found, strict=True)):
        own = [greedy[place], drawn[place], drawn[place + len(problems)]]
        share = sum(final == one.answer.final for final in own) / 3
        assert student.solves_alike == share
        right = student.verdict > 0
        assert student.verdict == student.feedback.written_score
        doubt = 6 * (1 - share if right else share) - student.logprob
        doubt += 2 * (1 - student.head_score if right else 1 + student.head_score)
        assert student.confidence == pytest.approx(1 / (1 + doubt), abs=1e-6)
        assert student.confidence <= before.confidence
        written = lengths[place] + more[place] + more[place + len(problems)]
        assert student.usage.tokens["student_solution"] == written
    assert len({student.solves_alike for student in found}) > 2


def test_the_verdict_is_the_heads_only_where_the_text_has_no_score():
    silent = StudentFeedback(prompts.Feedback("", None), 0.5, logprob=-1.0)
    assert silent.verdict == 0.5 and silent.confidence == round(1 / 3, 6)
    speaks = dataclasses.replace(silent, feedback=prompts.Feedback("", -0.2))
    assert speaks.verdict == -0.2 and speaks.confidence == 0.2
    assert dataclasses.replace(speaks, solves_alike=0.5).confidence == 0.125
    assert dataclasses.replace(speaks, head_score=None).confidence == 0.5
    nothing = dataclasses.replace(silent, head_score=None)
    assert nothing.verdict is None and nothing.confidence is None


def test_a_solution_to_learn_from_is_the_final_answer_after_the_bare_question(pair, config, judged):
    finished = merge_and_revise(
        pair, judged, config.generation, config.episode, lambda step: 0, quiet
    )
    assert sum(one.is_correct for one in finished) >= 6
    for one in finished:
        question = one.problem.question
        sample = solution_of(pair, Problem("p", question, "", ""), one.final, config.losses)
        text = pair.expert.tokenizer.decode(sample.target)
        assert text.removesuffix("<|end|>") == one.final.text
        begun = first_prompt(pair.expert, prompts.answer_prompt(question))
        assert sample.prompt == begun
        assert sample.expert_score is None
        whole = pair.expert.view.forward(mx.array([[*sample.prompt, *sample.target[:-1]]]))
        assert mx.allclose(sample.expert.targets, whole.final[0, len(begun) - 1 :], atol=1e-4)


def test_a_draft_by_the_command_line(tmp_path):
    """The same rows as without; the terminal and the report say what the student proposed."""
    options = ["--preset", "tiny", "--episodes", "2", "--batch-size", "2", "--exam-size", "0"]
    options += ["--kd-steps", "1", "--probe-size", "1", "--own-solutions", "0", "--sequential"]
    options += ["--max-feedback-tokens", "32", "--max-merge-tokens", "16"]
    found = {}
    for tokens in (0, 4):
        out = tmp_path / str(tokens)
        given = ["--speculate", tokens] if tokens else []
        done = shell("loop", *options, *given, "--out", out, cwd=tmp_path)
        assert done.status == 0, done.err
        found[tokens] = without_seconds(read_lines(out / "episodes.jsonl"))
    accepted = [row.pop("accepted") for row in found[4]]
    assert found[4] == found[0]
    # The student of the pair writes what the expert would in most places.
    assert all(row["expert_feedback"] > 10 for row in accepted)
    assert "student's proposals" in done.flat
    assert shell("report", out, "--out", tmp_path / "page.html", cwd=tmp_path).status == 0
    page = (tmp_path / "page.html").read_text()
    assert check_charts(page) >= 5
    assert "Tokens of the expert that the student had proposed" in page
    refused = shell("loop", "--preset", "tiny", "--speculate", "4", "--out", "x", cwd=tmp_path)
    assert refused.status == 2
    assert "batch_size is 64: add sequential, or set batch_size to 1" in refused.flat


def test_the_expert_alone_brings_its_preset(tmp_path):
    """`mlx-fd loop --expert tiny`: other problems than its own would mean nothing to it."""
    out = tmp_path / "run"
    options = ["--expert", "tiny", "--episodes", "4", "--batch-size", "2", "--exam-size", "2"]
    options += ["--kd-steps", "2"]
    done = shell("loop", *options, "--probe-size", "2", "--out", out, cwd=tmp_path)
    assert done.status == 0, done.err
    said = done.flat
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["exam"]) == {
        "score_error",
        "written_error",
        "readable",
        "first_error_on_wrong",
        "first_error_on_right",
        "first_error_f1",
        "solved",
    }
    assert summary["headroom"]["expert_right"] >= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    distilled = [row for row in rows if row["updates"]]
    assert distilled and all(len(row["updates"]) == 2 for row in distilled)
    # The second half of four answers, by both scores.
    assert [summary["judging"][score]["n"] for score in ("head", "written")] == [2, 2]
    for words in (
        "score head as a verdict",
        "first answers right",
        "final answers right",
        "exam: first error found",
    ):
        assert words in said
