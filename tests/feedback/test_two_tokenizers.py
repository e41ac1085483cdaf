"""Pairs whose models have different tokenizers: both read the same text, each in its own tokens."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd import runs
from mlx_fd.config import Config, LossOptions, override
from mlx_fd.errors import UserError
from mlx_fd.feedback.distill import make_optimizer, measure, update
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import sample_of, solution_of
from mlx_fd.feedback.turns import (
    answer,
    expert_feedback,
    first_answers,
    judge,
    student_feedback,
    student_prompt,
)
from mlx_fd.losses.kernel_checks import float64
from mlx_fd.models.tokenizer import open_template
from mlx_fd.problems import Problem
from mlx_fd.problems.prompts import Answer, answer_prompt, feedback_prompt
from mlx_fd.runs import plan as plans
from support.loops import assert_same, rows, start
from support.pairs import make_plan
from support.tiny import make_model_dir, make_tokenizer

# Other words around what is said than the expert's ChatML.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ALL_LOSSES = ["lm", "hidden", "score", "logit", "answer", "reasoning"]


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    expert = make_model_dir(folder / "expert", arch="qwen2", hidden=32, layers=3, intermediate=64)
    student = make_model_dir(
        folder / "student",
        tokenizer=make_tokenizer(330),
        chat_template=TEMPLATE,
        hidden=16,
        heads=2,
        kv_heads=1,
        intermediate=32,
        seed=1,
    )
    return expert, student


def plan_of(dirs, **changes):
    expert, student = map(open_template, dirs)
    plan = make_plan(*dirs, **changes)
    return dataclasses.replace(plan, vocab=0, template=student, expert_template=expert)


@pytest.fixture(scope="module")
def pair(dirs):
    return open_pair(plan_of(dirs))


@pytest.fixture(scope="module")
def judged(dirs, pair):
    plan = plan_of(dirs)
    options = plan.config.generation

    def nothing(*_):
        return None

    answered = first_answers(pair, plan.problems[:3], options, 0, nothing)
    students = student_feedback(pair, answered, options, 0, nothing)
    experts = expert_feedback(pair, answered, options, 0, nothing)
    return judge(answered, students, dict(enumerate(experts)))


def text_of(loaded, tokens):
    return loaded.tokenizer.decode(list(tokens))


def test_the_pair_keeps_both_tokenizers(pair):
    assert pair.expert.tokenizer is not pair.student_lm.tokenizer
    assert (pair.expert.vocab, pair.student_lm.vocab, pair.vocab) == (400, 330, 330)
    # All of the student's text tokens are the expert's too: it learned the same merges, but fewer.
    # 256 bytes, half of which are no character, 71 merges and three special tokens.
    assert len(pair.shared) == 256 - 128 + 71 + 3


def test_the_student_reads_the_text_as_its_own_template_writes_it(pair, judged):
    for one in judged:
        answered = one.answered
        said = text_of(pair.expert, answered.answer.tokens).removesuffix("<|im_end|>")
        turns = [answer_prompt(one.problem.question), said, feedback_prompt()]
        tokens = student_prompt(pair, answered)
        written = pair.student_lm.template.render(turns)
        assert text_of(pair.student_lm, tokens) == written + "Score:"


@pytest.mark.parametrize("on_policy", [False, True])
def test_both_are_given_one_text(pair, judged, on_policy):
    options = LossOptions()
    for one in judged:
        sample = sample_of(pair, one, options, on_policy=on_policy)
        feedback = one.student.feedback if on_policy else one.expert.feedback
        own = sample.target if on_policy else sample.expert_target
        assert own == feedback.tokens
        # Random bytes that are no text come out as the replacement character.
        if "\ufffd" not in text_of(pair.expert, sample.expert_target):
            texts = (
                text_of(pair.expert, sample.expert_target),
                text_of(pair.student_lm, sample.target),
            )
            assert texts[0] == texts[1]
        assert sample.expert_prompt == one.answered.prompt
        assert len(sample.matched) == len(sample.target) == len(sample.expert.targets.values)


PROBLEM = Problem("1", "Tom has 3 apples. How many?", "#### 3", "3")
SOLUTION = "Tom has 3 apples and buys 5 more apples.\n3 + 5 = 8\n#### 8"
LOSSES = LossOptions(losses=tuple(ALL_LOSSES))


@pytest.fixture(scope="module")
def solution(pair):
    tokens = tuple(pair.expert.tokenizer.encode(SOLUTION, add_special_tokens=False))
    tokens = (*tokens, pair.expert.tokenizer.eos_token_id)
    return solution_of(pair, PROBLEM, Answer(SOLUTION, None, tokens), LOSSES)


def log_softmax(rows):
    return rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)


def dense_logits(model, prompt, target):
    """Of the model itself, where each token of a text is predicted, before the temperature."""
    logits = model(mx.array([*prompt, *target[:-1]])[None])
    return float64(logits[0, len(prompt) - 1 :])


def test_distributions_are_compared_where_both_have_the_same_token(pair, solution):
    """Value of logit, reasoning and answer, from whole logits in float64."""
    one, two = pair.expert.tokenizer, pair.student_lm.tokenizer
    names = [
        [text_of(loaded, [token]) for token in tokens]
        for loaded, tokens in (
            (pair.expert, solution.expert_target),
            (pair.student_lm, solution.target),
        )
    ]
    assert names[0] != names[1] and "".join(names[0]) == "".join(names[1])
    begins = [np.cumsum([0, *map(len, of)])[:-1].tolist() for of in names]
    expert_at = {
        (at, name): k for k, (at, name) in enumerate(zip(begins[0], names[0], strict=True))
    }
    places = [
        (k, expert_at[at, name])
        for k, (at, name) in enumerate(zip(begins[1], names[1], strict=True))
        if (at, name) in expert_at
    ]
    assert [k for k, known in enumerate(solution.matched) if known] == [k for k, _ in places]
    assert 10 < len(places) < len(solution.target)
    # The end of the turn is one token to both.
    assert places[-1] == (len(solution.target) - 1, len(solution.expert_target) - 1)

    temperature = LOSSES.loss_temperature
    assert temperature != 1
    of_expert = dense_logits(pair.expert.model, solution.expert_prompt, solution.expert_target)
    of_student = dense_logits(pair.student.model, solution.prompt, solution.target)
    log_p, log_q = log_softmax(of_expert / temperature), log_softmax(of_student / temperature)
    divergences = {}
    vocabularies = one.get_vocab(), two.get_vocab()
    shared = [
        (vocabularies[0][name], number)
        for name, number in vocabularies[1].items()
        if name in vocabularies[0] and "\ufffd" not in two.decode([number])
    ]
    assert sorted(shared) == sorted(zip(pair.shared.expert, pair.shared.student, strict=True))
    experts, students = map(list, zip(*shared, strict=True))
    for own, theirs in places:
        p, q = np.exp(log_p[theirs, experts]), np.exp(log_q[own, students])
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        divergences[own] = temperature**2 * float((p * np.log(p / q)).sum())
    found = measure(pair.student, pair.expert, [solution], LOSSES, pair.vocab, 1)
    assert found["logit"] == pytest.approx(np.mean(list(divergences.values())), rel=1e-4)
    weights = np.array(solution.steps)
    assert set(np.flatnonzero(weights)) <= set(divergences)
    expected = sum(weights[k] * divergences[k] for k in np.flatnonzero(weights)) / weights.sum()
    assert found["reasoning"] == pytest.approx(expected, rel=1e-4)
    answer_tokens = [k for k, writes in enumerate(solution.answer) if writes]
    assert "".join(names[1][k] for k in answer_tokens).startswith("#### 8")
    log_q = log_softmax(of_student)
    surprise = -sum(log_q[k, solution.target[k]] for k in answer_tokens)
    assert found["answer"] == pytest.approx(surprise, rel=1e-4)


def test_it_learns_from_both(dirs):
    """A few steps on the logit loss alone bring the student nearer to the expert."""
    plan = plan_of(dirs, losses=["logit"])
    pair, config = open_pair(plan), plan.config
    tokens = tuple(pair.expert.tokenizer.encode(SOLUTION, add_special_tokens=False))
    samples = [solution_of(pair, PROBLEM, Answer(SOLUTION, None, tokens), config.losses)]
    optimizer = make_optimizer(pair.student, config.training)
    before = measure(pair.student, pair.expert, samples, config.losses, pair.vocab, 1)
    for _ in range(5):
        update(pair, optimizer, samples, {"logit": 1.0}, config.losses, config.training)
    after = measure(pair.student, pair.expert, samples, config.losses, pair.vocab, 1)
    assert after["logit"] < 0.9 * before["logit"]


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": ALL_LOSSES, "epochs": 2, "gate": "always", "episodes": 4},
        {"answers_by": "student", "episodes": 4, "on_policy_fraction": 0.5, "gate": "always"},
    ],
    ids=["two epochs", "the student answers"],
)
def test_a_run_resumes_as_if_it_had_not_stopped(dirs, tmp_path, changes):
    plan = plan_of(dirs, teacher_top_k=16, teacher_cache=str(tmp_path / "cache"), **changes)
    summary = start(tmp_path / "whole", plan)
    assert summary["episodes"] == 4
    assert all(np.isfinite(list(summary["probe"]["before"].values())))
    stopped = tmp_path / "stopped"
    answers = iter([False, True])
    assert start(stopped, plan, stop=lambda: next(answers)) is None
    assert start(stopped, plan) is not None
    assert_same(tmp_path / "whole", stopped)
    (sample, *_) = json.loads((stopped / "probe.json").read_text())["samples"]
    assert sample["expert_target"] != sample["target"]
    assert len(rows(stopped, runs.EPISODES)) == 4


def test_the_student_s_answer_is_the_expert_s_text(dirs, pair):
    config = plan_of(dirs, answers_by="student").config
    (answered,) = first_answers(pair, [PROBLEM], config.generation, 0, lambda *_: None)
    (own,) = answer(pair.student_lm, [PROBLEM], config.generation, 0, lambda *_: None)
    tokens = answered.conversation.tokens
    written = pair.expert.template.render([answer_prompt(PROBLEM.question)])
    said = text_of(pair.student_lm, own.answer.tokens)
    assert text_of(pair.expert, tokens) == written + said
    assert answered.answer.text == own.answer.text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"losses": ["attention"]}, "the attention loss"),
        ({"standardize_logits": True}, "standardize_logits"),
        ({"expert_thinking": "on"}, "expert_thinking"),
        ({"speculate": 4, "sequential": True}, "speculate"),
        (
            {"student_context": "feedback", "answers_by": "student"},
            "student_context = feedback",
        ),
    ],
)
def test_what_needs_one_tokenizer_is_refused_before_anything_is_loaded(dirs, changes, what):
    names = {"expert": str(dirs[0]), "student": str(dirs[1])}
    config = override(Config(), {**names, "probe_size": 2, "episodes": 2, **changes}, "test")
    with pytest.raises(UserError, match=f"different tokenizers, and {what} needs one"):
        plans.make_plan(config)


def test_the_user_is_told_once(dirs):
    names = {"expert": str(dirs[0]), "student": str(dirs[1])}
    small = {"probe_size": 2, "episodes": 2, "max_answer_tokens": 8}
    plan = plans.make_plan(override(Config(), {**names, **small}, "test"))
    assert plan.vocab == 0
    (note,) = [note for note in plan.notes if "different tokenizers" in note]
    assert "each reads the same text in its own tokens" in note
