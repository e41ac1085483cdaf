"""The loop's student matched to itself reading what the expert made of its answer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_fd import runs
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.feedback import distill
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.stages import (
    Answered,
    ExpertFeedback,
    Finished,
    Judged,
    StudentFeedback,
    Usage,
)
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.problems import Problem, prompts
from mlx_fd.training.selfdistill.in_loop import lessons, self_distillation_loss
from support.loops import rows, start
from support.pairs import logits_of, make_dirs, make_plan


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


def outcome(final, revised, feedback="The first step is wrong."):
    problem = Problem("p", "2 + 3?", "2 + 3 = 5\n#### 5", "5")
    answer = prompts.Answer(f"#### {final}", str(final), (7, 8, 9))
    given = prompts.Feedback(feedback, 0.5, (1,))
    judged = Judged(
        Answered(problem, answer, Conversation(), ()),
        StudentFeedback(prompts.Feedback("", None), 0.0),
        ExpertFeedback(given, Conversation()) if feedback else None,
    )
    end = prompts.Answer(revised or answer.text, None)
    return Finished(judged, 0.5, "", revised, "", end, Usage())


def test_what_the_student_reads_of_its_own():
    mended = outcome(4, "2 + 3 = 5\n#### 5")
    kept = outcome(5, "")
    lost = outcome(4, "#### 6")
    found = lessons([mended, kept, lost], "step-critique")
    assert [attempt.correct for attempt in found.attempts] == [False, True]
    assert "2 + 3 = 5" in found.views[0].teacher and "#### 5" in found.views[1].teacher
    assert found.views[0].student == prompts.answer_prompt("2 + 3?")
    assert all(attempt.tokens == (7, 8, 9) for attempt in found.attempts)
    of_feedback = lessons([mended, outcome(4, "", feedback="")], "feedback")
    assert len(of_feedback.views) == 1
    assert "The first step is wrong." in of_feedback.views[0].teacher


def test_the_term_is_the_forward_kl_to_the_student_with_the_feedback(dirs):
    plan = make_plan(*dirs)
    pair = open_pair(plan)
    # The freshly made adapter does nothing; this one does.
    model, view = pair.student_lm.model, pair.student_lm.view
    changed = [
        (name, mx.full(value.shape, 0.05))
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    found = lessons([outcome(4, ""), outcome(5, "")], "feedback")
    grads, value = self_distillation_loss(pair.student_lm, found, plan.config.training)

    def distributions(message):
        prompt = first_prompt(pair.student_lm, message)
        final = view.forward(mx.array([[*prompt, 7, 8]])).final[0, -3:]
        rows = np.array(logits_of(view, final), np.float64)[:, : pair.student_lm.vocab]
        rows = rows - rows.max(axis=1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

    own, theirs = distributions(found.views[0].student), distributions(found.views[0].teacher)
    kl = (np.exp(theirs) * (theirs - own)).sum(axis=1).mean()
    assert kl > 1e-4 and value == pytest.approx(kl, rel=1e-4)
    assert any(float(mx.abs(grad).max()) > 0 for _, grad in tree_flatten(grads))


class Recorder:
    """Takes the place of an optimiser, and keeps the gradient that it is given."""

    state = ()

    def update(self, model, gradients):
        self.gradients = dict(tree_flatten(gradients))


def test_the_term_is_added_to_the_update(dirs):
    plan = make_plan(*dirs)
    pair = open_pair(plan)
    training = override(plan.config, {"max_grad_norm": 0.0}, "test").training
    grads = tree_map(mx.ones_like, pair.student.model.trainable_parameters())
    found = {}
    for weight in (None, 0.5):
        recorder = Recorder()
        losses = {"losses": ["lm"], "student_context_weight": weight or 1.0}
        sample = distill.Sample((3, 4, 5), (7, 8), _reading(pair, plan), 0.5)
        update = distill.update(
            pair,
            recorder,
            [sample],
            {"lm": 1.0},
            override(plan.config, losses, "test").losses,
            training,
            None if weight is None else lambda: (grads, 3.0),
        )
        found[weight] = (update, recorder.gradients)
    plain, both = found[None][1], found[0.5][1]
    for name, value in plain.items():
        extra = 0.5 if name.startswith("model.") else 0.0
        np.testing.assert_allclose(np.array(both[name]), np.array(value) + extra, atol=1e-6)
    assert found[0.5][0].losses["self"] == 3.0
    assert found[0.5][0].total == pytest.approx(found[None][0].total + 1.5)


def _reading(pair, plan):
    from mlx_fd.feedback.samples import read_text

    return read_text(pair, Conversation(), (3, 4, 5), (7, 8), plan.config.losses)


def test_a_loop_learns_it_where_it_is_told_to(dirs, tmp_path):
    options = {"answers_by": "student", "episodes": 4, "gate": "always"}
    start(tmp_path / "plain", make_plan(*dirs, **options))
    start(tmp_path / "both", make_plan(*dirs, student_context="feedback", **options))
    plain, both = (
        [u for row in rows(tmp_path / name, runs.METRICS) for u in row["updates"]]
        for name in ("plain", "both")
    )
    assert all("self" not in update["losses"] for update in plain)
    assert all(update["losses"]["self"] >= 0 for update in both)
    assert rows(tmp_path / "plain")[0]["answer"] == rows(tmp_path / "both")[0]["answer"]
    assert plain[-1]["losses"]["lm"] != both[-1]["losses"]["lm"]


def test_it_is_about_the_students_own_answers():
    with pytest.raises(UserError, match="the student's own answers"):
        override(Config(), {"student_context": "feedback", "answers_by": "expert"}, "test")
