"""The systems that the loop is compared with, on the embedded pair: what they do and count."""

import dataclasses
import math
from collections import Counter

import pytest

from mlx_fd import problems
from mlx_fd.config import preset
from mlx_fd.evaluation.baselines import SYSTEMS, Setting
from mlx_fd.evaluation.solving import answered_by
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.feedback.gate import initial_state
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.risk import RunningTrust, Trust
from mlx_fd.feedback.turns import (
    answer,
    expert_feedback,
    first_answers,
    judge,
    merge_and_revise,
    student_feedback,
)
from mlx_fd.models.conversation import Conversation, without_repeated_eos
from mlx_fd.models.generation import followup_prompt
from mlx_fd.models.resolve import resolve
from mlx_fd.models.tokenizer import open_template
from mlx_fd.problems import parsing
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.prompts import critique_prompt
from mlx_fd.runs.plan import Plan

CONFIG = preset("tiny")
OPTIONS = CONFIG.generation
PROBLEMS = problems.load("arithmetic", "test").problems[:4]


def quiet(step, tokens):
    pass


def seeds(step):
    return derive_seed(0, 0, step)


@pytest.fixture(scope="module")
def pair():
    expert, student = resolve("tiny"), resolve("tiny-student")
    plan = Plan(CONFIG, expert, student, 2000, open_template(expert), (), (), {}, ())
    return open_pair(plan)


@pytest.fixture(scope="module")
def answered(pair):
    """The student's answers, some right and some wrong."""
    answers = answer(pair.student_lm, PROBLEMS, OPTIONS, 1, quiet, keep=False)
    assert len({one.is_correct for one in answers}) == 2
    return [
        dataclasses.replace(one, conversation=Conversation(one.conversation.tokens))
        for one in answers
    ]


def setting_of(pair, *, target=None, threshold=None, **generation):
    episode = CONFIG.episode
    if target is not None:
        episode = dataclasses.replace(episode, target_score=target)
    running = RunningTrust(trust=Trust(threshold))
    state = dataclasses.replace(initial_state(CONFIG.gate, ["lm"]), running=running)
    return Setting(pair, dataclasses.replace(OPTIONS, **generation), episode, "student", state)


@pytest.fixture(scope="module")
def ran(pair, answered):
    """What each system made of the answers, and the tokens that it told of, by step."""
    found = {}
    for name, system in SYSTEMS.items():
        told = Counter()

        def progress(step, tokens, told=told):
            told[step] += tokens

        found[name] = system.run(setting_of(pair), answered, seeds, progress), told
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_token_that_was_written_is_counted_once_and_has_an_owner(ran, answered, name):
    trials, told = ran[name]
    counted = Counter()
    for trial in trials:
        counted.update({step: n for step, n in trial.tokens.items() if step != "answer"})
        assert set(trial.by) == set(trial.tokens) == set(trial.prefilled) == set(trial.turns)
        assert trial.by["answer"] == "student"
        others = {step for step, who in trial.by.items() if who == "student"}
        assert others <= {"answer", "student_feedback"}
        assert type(trial).from_json(trial.to_json()) == trial
    assert counted == told
    # All of them go on from the same answers.
    assert [t.turns["answer"] for t in trials] == [d.answer.text for d in answered]


@pytest.mark.parametrize("name", ["self-refine", "clear"])
def test_one_at_a_time_without_caches_says_the_same(pair, answered, ran, name):
    batched = ran[name][0][2:]
    alone = SYSTEMS[name].run(setting_of(pair, sequential=True), answered[2:], seeds, quiet)
    assert [t.turns for t in batched] == [t.turns for t in alone]
    assert [t.tokens for t in batched] == [t.tokens for t in alone]
    # What was said before is read again in each turn there, and only there.
    assert sum(sum(t.prefilled.values()) for t in batched) < sum(
        sum(t.prefilled.values()) for t in alone
    )


def test_the_loop_is_the_episode_without_learning(pair):
    first = first_answers(pair, PROBLEMS, OPTIONS, 0, quiet)
    students = student_feedback(pair, first, OPTIONS, seeds("student_feedback"), quiet)
    experts = expert_feedback(pair, first, OPTIONS, seeds("expert_feedback"), quiet)
    judged = judge(first, students, dict(enumerate(experts)))
    finished = merge_and_revise(pair, judged, OPTIONS, CONFIG.episode, seeds, quiet)
    trials = SYSTEMS["loop"].run(setting_of(pair), first, seeds, quiet)
    assert [t.final for t in trials] == [one.final.text for one in finished]
    assert [t.score for t in trials] == [one.score for one in finished]


def test_a_trusted_student_stands_alone(pair, answered):
    loop = SYSTEMS["loop"].run
    alone = loop(setting_of(pair, threshold=0.0), answered, seeds, quiet)
    assert all("expert_feedback" not in t.tokens for t in alone)
    for threshold in (None, 1.0):
        asked = loop(setting_of(pair, threshold=threshold), answered[:1], seeds, quiet)
        assert all("expert_feedback" in t.tokens for t in asked)


@pytest.fixture(scope="module")
def of_student(answered):
    """The same answers, which the student is known to have given."""
    return [dataclasses.replace(one, by_student=True) for one in answered]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("check_alone", [True, False])
def test_what_the_student_alone_judged_is_checked_whatever_its_score(
    pair, of_student, asked, check_alone
):
    """-1 is a score that every answer reaches, and by which every text finds it right."""
    episode = dataclasses.replace(CONFIG.episode, target_score=-1.0, check_alone=check_alone)
    setting = dataclasses.replace(
        setting_of(pair, threshold=1.0 if asked else 0.0), episode=episode
    )
    trials = SYSTEMS["loop"].run(setting, of_student, seeds, quiet)
    after = {"expert_solution", "merge", "revise", "critique", "final"}
    found = [after & t.tokens.keys() for t in trials]
    if check_alone and not asked:
        assert all("expert_solution" in steps and "revise" not in steps for steps in found)
    else:
        assert found == [set()] * len(PROBLEMS)


def test_the_expert_solves_what_the_student_alone_finds_right(pair, of_student):
    """It leaves what it comes to itself, and criticises the rest, knowing of neither."""
    trials = SYSTEMS["loop"].run(setting_of(pair, threshold=0.0), of_student, seeds, quiet)
    options = dataclasses.replace(OPTIONS, answer_temperature=OPTIONS.expert_temperature)
    own = answer(pair.expert, PROBLEMS, options, 0, quiet, keep=False)
    asks = followup_prompt(pair.expert, critique_prompt())
    alike = []
    for first, solved, trial in zip(of_student, own, trials, strict=True):
        assert "Every step is right." in trial.turns["student_feedback"]
        assert trial.turns["expert_solution"] == solved.answer.text
        assert trial.by["expert_solution"] == "expert"
        assert trial.tokens["expert_solution"] == solved.usage.tokens["answer"]
        assert trial.prefilled["expert_solution"] == solved.usage.prefilled["answer"]
        alike.append(solved.answer.final == first.answer.final)
        if alike[-1]:
            assert trial.final == first.answer.text
            assert not {"critique", "final"} & trial.tokens.keys()
        else:
            talk = first.conversation
            read = len(talk.tokens) + len(without_repeated_eos(talk, asks))
            assert trial.prefilled["critique"] == read
            assert "final" in trial.tokens
        assert not {"merge", "revise"} & trial.tokens.keys()
    assert set(alike) == {True, False}
    # It finds errors that the student does not see: some of these answers are wrong.
    finals = [is_right(read_final(t.final, p), p) for t, p in zip(trials, PROBLEMS, strict=True)]
    assert sum(finals) > sum(one.is_correct for one in of_student)


def ungraded(one):
    return dataclasses.replace(one, problem=dataclasses.replace(one.problem, kind="none"))


def unread(one):
    return dataclasses.replace(one, answer=dataclasses.replace(one.answer, final=None))


@pytest.mark.parametrize(
    "changed",
    [lambda one: dataclasses.replace(one, by_student=False), ungraded, unread],
    ids=["the expert's own answer", "finals that cannot be compared", "no final answer"],
)
def test_where_its_own_solution_tells_nothing_the_expert_criticises_at_once(
    pair, of_student, changed
):
    answers = [changed(one) for one in of_student[:2]]
    trials = SYSTEMS["loop"].run(setting_of(pair, threshold=0.0), answers, seeds, quiet)
    after = {"expert_solution", "merge", "revise", "critique", "final"}
    assert [after & t.tokens.keys() for t in trials] == [{"critique", "final"}] * 2


def test_the_expert_revises_what_the_student_alone_does_not_find_right(pair, of_student):
    trials = SYSTEMS["loop"].run(
        setting_of(pair, threshold=0.0, target=1.1), of_student, seeds, quiet
    )
    assert all("revise" in t.tokens and "expert_solution" not in t.tokens for t in trials)


def test_a_trusted_student_also_solves_what_it_judges_alone(pair, answered):
    """Its threshold was set by confidences that its own solutions count in."""
    rows = [
        {
            **{"tokens": list(one.answer.tokens), "text": one.answer.text},
            **{"prefilled": 0, "written": len(one.answer.tokens), "seconds": 0.0},
            **{"capped": [], "thoughts": {}, "closed": []},
        }
        for one in answered
    ]
    begun = [
        answered_by(pair, one.problem, row, "student")
        for one, row in zip(answered, rows, strict=True)
    ]
    assert [one.answer.final for one in begun] == [one.answer.final for one in answered]
    alone = SYSTEMS["loop"].run(setting_of(pair, threshold=0.0), begun, seeds, quiet)
    for trial, one in zip(alone, begun, strict=True):
        assert (trial.tokens.get("student_solution", 0) > 0) is (one.answer.final is not None)
        assert trial.by.get("student_solution", "student") == "student"


def test_clear_takes_the_score_that_its_amateur_wrote(pair, answered, ran):
    """The untrained score head says 0 to everything; that is no opinion."""
    students = student_feedback(pair, answered, OPTIONS, seeds("student_feedback"), quiet)
    experts = expert_feedback(pair, answered, OPTIONS, seeds("expert_feedback"), quiet)
    weight = CONFIG.episode.student_weight
    for trial, student, expert in zip(ran["clear"][0], students, experts, strict=True):
        assert student.head_score == 0
        both = student.feedback.written_score, expert.feedback.written_score
        assert trial.score == pytest.approx((weight * both[0] + both[1]) / (1 + weight))


@pytest.mark.parametrize(
    ("name", "stages"),
    [("cot", ("reasoning", "feedback")), ("cod", ("draft_1", "draft_2", "draft_3"))],
)
def test_a_critic_goes_through_its_stages_and_one_revision_follows(pair, answered, name, stages):
    run = SYSTEMS[name].run
    for trial in run(setting_of(pair, target=math.inf), answered[:2], seeds, quiet):
        assert tuple(trial.turns) == ("answer", *stages, "revise")
        assert trial.last == "revise"
        assert trial.score == parsing.parse_feedback(trial.turns[stages[-1]]).written_score
    for trial in run(setting_of(pair, target=-1.0), answered[:2], seeds, quiet):
        stays = trial.score is not None
        assert (trial.last == "answer") == stays
        assert ("revise" in trial.turns) != stays


def test_self_refine_goes_on_until_its_feedback_says_right_or_four_times(pair, answered, ran):
    steps = [f"{what}_{k}" for k in range(1, 5) for what in ("feedback", "refine")]
    never = setting_of(pair, target=math.inf)
    for trial in SYSTEMS["self-refine"].run(never, answered[:1], seeds, quiet):
        assert list(trial.turns) == ["answer", *steps]
        assert trial.last == "refine_4"
    right_before = right_after = 0
    for trial, first in zip(ran["self-refine"][0], answered, strict=True):
        feedbacks = [step for step in trial.turns if step.startswith("feedback")]
        scores = [parsing.parse_feedback(trial.turns[step]).written_score for step in feedbacks]
        assert trial.score == scores[0]
        target = CONFIG.episode.target_score
        assert all(score is None or score < target for score in scores[:-1])
        if len(feedbacks) < 4:
            assert scores[-1] >= target
        right_before += first.is_correct
        right_after += is_right(read_final(trial.final, first.problem), first.problem)
    # This expert is good at its trade.
    assert right_after > right_before


def test_a_bare_model_answers_and_no_more(ran, answered):
    for trial, draft in zip(ran["student"][0], answered, strict=True):
        assert trial.turns == {"answer": draft.answer.text} and trial.last == "answer"
        assert read_final(trial.final, draft.problem) == draft.answer.final
