import collections
import dataclasses
import json
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_fd import runs
from mlx_fd.config import TrainingOptions
from mlx_fd.feedback.distill import make_optimizer, update
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.stages import Answered, Finished, Judged, StudentFeedback, Usage
from mlx_fd.models.conversation import Conversation
from mlx_fd.problems.prompts import Answer, Feedback
from mlx_fd.runs.events import Warned
from mlx_fd.training import replay as replaying
from mlx_fd.training.learner import Learner
from mlx_fd.training.learning import _lag, solutions_of
from mlx_fd.training.probe import Headroom, Probe
from mlx_fd.training.rehearsal import samples_again
from mlx_fd.training.replay import Memory, Remembered, Replay, choose
from support.loops import assert_same, rows, start
from support.pairs import make_dirs, make_plan

MIXED = {
    "replay": 1.0,
    "step_samples": 3,
    "kd_steps": 3,
    "replay_size": 5,
    "replay_balance": True,
    "solutions": True,
    "score_at": "own",
    "trigger": "always",
    "target_score": 1.0,
}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return make_dirs(tmp_path_factory.mktemp("pair"), layers=(2, 1))


def remembered(*kinds, lags=None):
    lags = lags or [1.0] * len(kinds)
    kept = [Remembered(n, kind, lag) for n, (kind, lag) in enumerate(zip(kinds, lags, strict=True))]
    return Replay(len(kept), tuple(kept))


def drawn(past, new, steps=1, seed=0, **options):
    options = TrainingOptions(kd_steps=steps, **options)
    return choose(past, new, options, np.random.default_rng(seed))


def test_a_step_has_all_new_samples_and_for_each_some_earlier_ones():
    replay = remembered(*["right"] * 20)
    assert sorted(drawn(replay, [18, 19], replay=0)[0]) == [18, 19]
    for lines in drawn(replay, [18, 19], steps=5, replay=3.0):
        assert sorted(lines[:2]) == [18, 19]
        assert len(lines) == len(set(lines)) == 8 and max(lines[2:]) < 18
    # Where fewer are remembered, all of them.
    assert sorted(drawn(remembered(*["right"] * 4), [3], replay=9.0)[0]) == [0, 1, 2, 3]


def test_in_steps_of_some_samples_each_new_one_has_its_turn():
    replay = remembered(*["right"] * 30)
    new = list(range(20, 30))
    steps = drawn(replay, new, steps=5, step_samples=4, replay=1.0)
    assert all(len(lines) == len(set(lines)) == 4 for lines in steps)
    turns = collections.Counter(line for lines in steps for line in lines if line >= 20)
    assert turns == dict.fromkeys(new, 1)
    # Also where a step begins another round: what it has already comes last, and is not left out.
    for seed in range(20):
        steps = drawn(Replay(), [0, 1, 2], steps=3, seed=seed, step_samples=2, replay=0)
        assert all(len(set(lines)) == 2 for lines in steps)
        turns = collections.Counter(line for lines in steps for line in lines)
        assert turns == {0: 2, 1: 2, 2: 2}
    # Few new ones leave room for more earlier ones; without replay for none.
    few = drawn(replay, new[:1], steps=2, step_samples=4, replay=1.0)
    assert all(lines[0] == 20 and len(set(lines)) == 4 for lines in few)
    assert drawn(replay, new[:1], step_samples=4, replay=0) == [[20]]
    # At the beginning there is nothing to mix in.
    first = drawn(remembered(*["right"] * 10), list(range(10)), step_samples=4, replay=1.0)
    assert len(first[0]) == 4


def test_what_lags_and_what_is_wrong_is_drawn_more_often():
    kinds = ["wrong"] * 5 + ["right"] * 20 + ["other"] * 5 + ["right"]
    replay = remembered(*kinds, lags=[1.0] * 25 + [0.1] * 5 + [1.0])

    def shares(**options):
        steps = drawn(replay, [30], steps=3000, replay=1.0, **options)
        counts = collections.Counter(kinds[lines[1]] for lines in steps)
        return [counts[kind] / 3000 for kind in ("wrong", "right", "other")]

    assert shares(replay_by="uniform") == pytest.approx([5 / 30, 20 / 30, 5 / 30], abs=0.03)
    total = 25.5
    assert shares() == pytest.approx([5 / total, 20 / total, 0.5 / total], abs=0.03)
    balanced = shares(replay_by="uniform", replay_balance=True)
    assert balanced == pytest.approx([12.5 / 30, 12.5 / 30, 5 / 30], abs=0.03)


@pytest.mark.parametrize("kind", ["wrong", "right", "other"])
def test_with_one_kind_alone_there_is_nothing_to_balance(kind):
    replay = remembered(*[kind] * 6, *["other"] * 6, lags=[0.5] * 6 + [1.0] * 6)
    plain, balanced = (
        drawn(replay, [12], steps=200, replay=1.0, replay_balance=balance)
        for balance in (False, True)
    )
    assert balanced == plain


def test_what_is_remembered_is_bounded_and_survives_json():
    replay = remembered("wrong", "right", "other")
    replay = dataclasses.replace(
        replay, kept=tuple(dataclasses.replace(one, fresh=True) for one in replay.kept)
    )
    assert replay.fresh() == (0, 1, 2)
    after = replay.learned({1: 0.25}, most=2)
    assert after.fresh() == () and after.lines == 3
    assert after.kept == (Remembered(1, "right", 0.25), Remembered(2, "other", 1.0))
    assert replay.learned({}, most=0).kept == ()
    for one in (replay, after):
        assert Replay.from_json(json.loads(json.dumps(one.to_json()))) == one
    memory = Memory(lambda lines: [f"sample {line}" for line in lines], {0: "zero", 7: "seven"})
    assert memory.of([7, 2]) == ["seven", "sample 2"]
    memory.keep(after)
    assert memory.samples == {2: "sample 2"}


@pytest.mark.parametrize("lag", [math.nan, math.inf])
def test_what_voided_an_update_is_forgotten(lag):
    after = remembered("right", "other", "wrong").learned({0: 0.5, 1: lag}, most=3)
    assert [(one.line, one.lag) for one in after.kept] == [(0, 0.5), (2, 1.0)]
    assert after.lines == 3


@pytest.mark.parametrize(("losses", "kept"), [("lm", 1), ("lm,logit", 0)])
def test_a_solution_that_overflowed_in_the_expert_is_not_learned_from(dirs, losses, kept):
    plan = make_plan(*dirs, losses=losses.split(","), solutions=True)
    pair, events, problem = open_pair(plan), [], plan.problems[0]
    text = f"#### {problem.answer}"
    answer = Answer(text, problem.answer, tuple(pair.expert.tokenizer.encode(text)))
    answered = Answered(problem, answer, Conversation(), ())
    judged = Judged(answered, StudentFeedback(Feedback("", 1.0), None), None)
    finished = Finished(judged, 1.0, "", "", "", answer, Usage())
    learner = Learner(
        pair=pair,
        probe=Probe((), Headroom(0, 0, 0, 0, 0, 0, 0)),
        optimizer=make_optimizer(pair.student, plan.config.training),
        config=plan.config,
        report=events.append,
        batches=1,
        cache=None,
        memory=Memory(lambda lines: []),
    )
    assert len(solutions_of([finished], [0], learner)) == 1 and not events
    norm = pair.expert.model.model.norm
    norm.weight = mx.full(norm.weight.shape, math.inf)
    assert len(solutions_of([finished], [0], learner)) == kept
    assert [type(one) for one in events] == [Warned] * (1 - kept)
    assert kept or f"the logit loss on a right solution of {problem.id}" in str(events[0])


def test_a_run_that_mixes_is_resumed_bit_for_bit(dirs, tmp_path, monkeypatch):
    """Stopped after each batch: what is replayed comes again from the log, to the same bits."""
    monkeypatch.setattr("mlx_fd.feedback.stages.is_right", lambda final, problem: True)
    plan = make_plan(*dirs, **MIXED)
    sizes = []
    kept = replaying.Memory.keep

    def counting(memory, replay):
        kept(memory, replay)
        sizes.append(len(memory.samples))

    monkeypatch.setattr(replaying.Memory, "keep", counting)
    summary = start(tmp_path / "whole", plan)
    assert max(sizes) == 5
    # Of the score only texts that it writes while it learns say something.
    assert set(summary["probe"]["after"]) == {"lm", "hidden", "logit"}
    for _ in range(3):
        answers = iter([False, True])
        assert start(tmp_path / "stopped", plan, stop=lambda a=answers: next(a)) is None
    start(tmp_path / "stopped", plan)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert rows(tmp_path / "whole", runs.SAMPLES) == rows(tmp_path / "stopped", runs.SAMPLES)

    # Two feedbacks and two solutions of each batch; a solution is learned from a batch later.
    logged = runs.read_samples(tmp_path / "whole")
    assert [row["batch"] for row in logged] == [batch for batch in range(4) for _ in range(4)]
    assert [bool(row.get("own")) for row in logged] == [True, True, False, False] * 4
    pair = open_pair(plan)
    first = samples_again(logged[:1], pair, plan.config, None)[0]
    again = samples_again(logged[:1], pair, plan.config, None)[0]
    for name, array in first.expert.arrays().items():
        assert np.array_equal(array, again.expert.arrays()[name])


def test_the_head_learns_only_on_what_the_student_has_just_said(dirs, tmp_path):
    plan = make_plan(*dirs, **MIXED)
    start(tmp_path / "run", plan)
    pair = open_pair(plan)
    logged = [row for row in runs.read_samples(tmp_path / "run") if row.get("own")][:2]
    read = samples_again(logged, pair, plan.config, None)
    new, old = (dataclasses.replace(s, expert_score=e) for s, e in zip(read, (1, -1), strict=True))
    weights = dict.fromkeys(plan.config.losses.losses, 1.0)
    rest = (weights, plan.config.losses, plan.config.training)

    def head_after(*samples):
        pair = open_pair(plan)
        optimizer = make_optimizer(pair.student, plan.config.training)
        done = update(pair, optimizer, samples, *rest)
        assert not done.skipped
        return done.each, np.array(pair.student.score_head.weight)

    each, both = head_after(new, old)
    assert all("score" in losses for losses in each)
    each, with_earlier = head_after(new, old.without_own())
    assert ["score" in losses for losses in each] == [True, False]
    assert old.without_own().target == old.target
    _, alone = head_after(new)
    # Adam's first step has the size of the rate, whichever way: the sign tells.
    assert np.array_equal(np.sign(with_earlier), np.sign(alone))
    assert not np.array_equal(np.sign(both), np.sign(alone))
    # How far it lags is about what will be learned again.
    assert _lag(new, {"lm": 1.0, "score": 5.0}, {"lm": 2.0, "score": 1.0}) == 2.0
    assert _lag(old.without_own(), {"lm": 1.0}, {"lm": 2.0, "score": 1.0}) == 2.0
