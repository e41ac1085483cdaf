"""Verdicts that the right answer contradicts: what becomes of them, and what nobody may see."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd import runs
from mlx_fd.config import Config, override, preset
from mlx_fd.errors import UserError
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import Sample, sample_of
from mlx_fd.feedback.stages import Answered, ExpertFeedback, Judged, StudentFeedback
from mlx_fd.feedback.verdicts import _second_look, contradicts, review, says_it_was_told, tally
from mlx_fd.models.conversation import Conversation, forward
from mlx_fd.models.generation import followup_prompt, said
from mlx_fd.problems import parsing, prompts
from mlx_fd.problems.kinds import read_final
from mlx_fd.runs.plan import make_plan
from mlx_fd.training.rehearsal import samples_again
from support.loops import assert_same, rows, start

RIGHT, WRONG = "1\nFeedback: Every step is right.", "-0.8\nFeedback: Step 1 is a slip."


def quiet(step, tokens):
    pass


@pytest.mark.parametrize(
    ("score", "right", "contradicted"),
    [
        *[(0.1, False, True), (-0.1, True, True), (0.1, True, False), (-1.0, False, False)],
        *[(0.0, True, False), (0.0, False, False)],
        *[(None, True, False), (1.0, None, False), (-1.0, None, False)],
    ],
)
def test_a_score_is_contradicted_only_by_a_right_answer_that_is_known(score, right, contradicted):
    assert contradicts(score, right) is contradicted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("As the given answer says, it is 12.", True),
        ("The provided correct answer differs from yours.", True),
        ("Compare it with the answer key.", True),
        ("The right final answer is 12.", True),
        ("I was told the answer, so it is wrong.", True),
        ("Step 2 should be 3*4=12, it is 3*4=13: a slip.", False),
        ("The answer is wrong: given 3 boxes of 4, there are 12.", False),
        ("The correct answer is 12, as 3*4=12.", False),
    ],
)
def test_a_feedback_that_says_it_was_told_is_recognised(text, told):
    assert says_it_was_told(text) is told


@pytest.fixture(scope="module")
def config() -> Config:
    changes = {
        **{"expert": "tiny-student", "student": "tiny-student", "episodes": 4, "batch_size": 2},
        **{"probe_size": 2, "exam_size": 0, "answer_temperature": 1.0, "kd_steps": 1},
        **{"max_answer_tokens": 24, "max_feedback_tokens": 48, "max_merge_tokens": 8},
    }
    return override(preset("tiny"), changes, "test")


@pytest.fixture(scope="module")
def plan(config):
    return make_plan(config)


@pytest.fixture(scope="module")
def pair(plan):
    return open_pair(plan)


def judged_as(pair, problem, answer, verdict) -> Judged:
    """An episode after step 2 in which the expert wrote this verdict on this answer."""
    expert = pair.expert

    def tokens(text):
        return tuple(expert.tokenizer.encode(text, add_special_tokens=False))

    asked = prompts.answer_prompt(problem.question)
    final = read_final(answer, problem)
    answered = Answered(
        problem,
        prompts.Answer(answer, final, tokens(answer)),
        Conversation(said(expert, asked, tokens(answer))),
        feedback_request(expert),
    )
    feedback = parsing.parse_feedback(f"Score: {verdict}", tokens(verdict))
    said_so = Conversation((*answered.prompt, *feedback.tokens))
    nothing = StudentFeedback(prompts.Feedback("", None), 0.0)
    return Judged(answered, nothing, ExpertFeedback(feedback, said_so))


@pytest.fixture(scope="module")
def judged(pair, plan):
    """Right and wrong verdicts on right and wrong answers."""
    one, two = plan.problems[:2]
    return [
        judged_as(pair, one, one.solution, RIGHT),
        judged_as(pair, one, one.solution, WRONG),
        judged_as(pair, two, "#### 9999", RIGHT),
        judged_as(pair, two, "#### 9999", WRONG),
        judged_as(pair, two, "#### 9999", "no score"),
    ]


def test_only_contradicted_verdicts_are_left_out(pair, judged, config):
    def reviewed(how):
        return review(pair, judged, how, config.generation, lambda step: 0, quiet)

    checked = reviewed("checked")
    assert [one.outcome for one in checked] == [
        *("agrees", "left out", "left out", "agrees", "unknown")
    ]
    assert [one.taught.expert is None for one in checked] == [False, True, True, False, False]
    assert [one.judged for one in checked] == judged
    assert tally([one.outcome for one in checked]) == {"agrees": 2, "left out": 2, "unknown": 1}
    as_is = reviewed("as-is")
    assert [one.taught for one in as_is] == judged
    assert tally([one.outcome for one in as_is]) == {"agrees": 2, "kept": 2, "unknown": 1}


def test_an_expert_that_is_asked_again_reads_the_right_answer_and_the_student_does_not(
    pair, judged, config
):
    found = review(pair, judged[:3], "privileged", config.generation, lambda step: 0, quiet)
    one, again = found[2], found[2].again
    assert found[0].again is None
    problem = one.judged.problem
    note = prompts.privileged_feedback_prompt(problem.answer)
    assert note.endswith(prompts.feedback_prompt())
    assert problem.answer in note.removesuffix(prompts.feedback_prompt())
    told = tuple(pair.expert.tokenizer.encode(note, add_special_tokens=False))
    read = pair.expert.tokenizer.decode(list(again.prompt))
    assert pair.expert.tokenizer.decode(list(told)) in read
    # What the episode goes on with is the first word, and the second one's cost is counted.
    assert one.judged.conversation == judged[2].conversation
    assert one.judged.expert.feedback == judged[2].expert.feedback
    assert one.judged.usage.tokens["privileged_feedback"] == len(again.feedback.tokens)
    # This expert reads no English: whatever it writes is not taught unless it is right.
    if again.feedback.written_score is None:
        assert (one.outcome, one.taught.expert) == ("wrong again", None)


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (WRONG, "asked again"),
        (RIGHT, "wrong again"),
        ("-0.8\nFeedback: The reference answer is another.", "leaks"),
        ("no score", "wrong again"),
    ],
)
def test_what_is_taught_where_the_expert_was_asked_again(pair, judged, verdict, outcome):
    wrong = judged[2]
    again = dataclasses.replace(
        judged_as(pair, wrong.problem, "#### 9999", verdict).expert, prompt=(1, 2, 3)
    )
    found = _second_look(wrong, again)
    assert found.outcome == outcome
    assert found.taught.expert == (again if outcome == "asked again" else None)
    assert found.judged.expert.feedback == wrong.expert.feedback
    assert found.to_json()["again"]["written_score"] == again.feedback.written_score


def test_the_expert_reads_what_it_wrote_where_it_was_told_and_learning_again_is_the_same(
    pair, judged, config
):
    wrong = judged[3]
    privileged = prompts.privileged_feedback_prompt(wrong.problem.answer)
    request = followup_prompt(pair.expert, privileged)
    before = wrong.answered.conversation
    told = (*before.tokens, *request, *pair.expert.tokenizer.encode("Score:"))
    tokens = wrong.expert.feedback.tokens
    again = ExpertFeedback(wrong.expert.feedback, Conversation((*told, *tokens)), prompt=told)
    sample = sample_of(pair, dataclasses.replace(wrong, expert=again), config.losses)
    assert sample.prompt == wrong.answered.prompt
    assert sample.target == tokens
    read = forward(pair.expert, Conversation(), [*told, *tokens[:-1]]).final[0]
    expects = np.array(sample.expert.targets)
    assert np.allclose(expects, np.array(read[len(told) - 1 :]), atol=1e-5)
    # Without being told it expects something else.
    plain = sample_of(pair, wrong, config.losses)
    assert not np.allclose(expects, np.array(plain.expert.targets), atol=1e-2)

    row = sample.to_json()
    assert "matched" not in row
    same = samples_again([row], pair, config, None)[0]
    assert dataclasses.replace(same, expert=None) == dataclasses.replace(sample, expert=None)
    assert mx.array_equal(same.expert.targets, sample.expert.targets)
    assert Sample.from_json(plain.to_json(), plain.expert) == plain


def test_a_run_teaches_no_contradicted_verdict_and_resumes_exactly(config, tmp_path):
    """The expert is a student that judges badly."""
    changes = {"expert_verdicts": "privileged", "checkpoint_every": 1}
    plan = make_plan(override(config, changes, "test"))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = start(whole, plan)
    episodes = rows(whole)
    contradicted = [
        row
        for row in episodes
        if contradicts(row["expert_feedback"]["written_score"], row["correct_before"])
    ]
    assert contradicted
    assert summary["expert_verdicts"]["contradicted"] == len(contradicted)
    for row in contradicted:
        assert row["verdict"]["again"] is not None
        assert row["verdict"]["outcome"] == "asked again" or not row["gate"]["distilled"]
    counted = [row["expert_verdicts"] for row in rows(whole, runs.METRICS)]
    assert sum(sum(one.values()) for one in counted) == len(episodes)
    answers = iter([False, True])
    start(stopped, plan, stop=lambda: next(answers))
    assert len(rows(stopped)) == 2
    start(stopped, plan)
    assert_same(whole, stopped)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert_thinking": "on"}, "expert_thinking to off"),
        ({"losses": ("lm", "attention")}, "leave attention out"),
    ],
)
def test_what_a_told_expert_does_not_go_with_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        override(Config(), {"expert_verdicts": "privileged", **changes}, "test")
    override(Config(), {"expert_verdicts": "checked", **changes}, "test")
