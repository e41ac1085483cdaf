import pytest

from mlx_fd.runs.acceptance import acceptance, accepted_count
from mlx_fd.runs.self_distillation_summary import find_warnings as self_warnings
from mlx_fd.runs.summary import (
    find_warnings,
    share_of,
    summarise,
    wilson,
    wilson_over_problems,
)


def row(
    before, after, expert=0.5, student=0.1, written=None, capped=(), alone=False, trusted=False
):
    return {
        "correct_before": before,
        "correct_after": after,
        "expert_feedback": None if alone else {"text": "t", "written_score": expert},
        "student_feedback": {"text": "t", "head_score": student, "written_score": written},
        "tokens": {"answer": 10} | ({} if alone else {"expert_feedback": 20}),
        "prefilled": {"answer": 30},
        "seconds": {"answer": 0.5},
        "capped": list(capped),
        "gate": {"trusted": trusted},
    }


def trust(threshold):
    return {"threshold": threshold, "coverage": 0, "audited": 0, "disagreed": 0, "bound": 1}


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Worked from the formula with z = 1.959964 (and the textbook's 15 of 25).
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 25, 0.4074, 0.7660), (0, 0, 0.0, 1.0)],
)
def test_wilson(right, n, low, high):
    found = wilson(right, n)
    assert found == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("attempts", "right", "n"),
    [
        (["+", "-", "+"], 2, 3),  # one at each problem: as many as attempts
        (["++++", "----"], 1, 2),  # all of a problem alike: as many as problems
        (["++++", "++++"], 2, 2),
        (["----", "----", "----"], 0, 3),
        (["++--", "++--"], 4, 8),  # no more alike than others
        (["+++-", "+---"], 4, 8),  # squares 1 and 1: 64 / 4 / 2 = 8
        (["++++", "+---"], 5 / 8 * 2 / 0.6, 2 / 0.6),  # 1.5 twice squared: 64 * 15/64 / 4.5
        ([], 0, 0),
    ],
)
def test_attempts_at_one_problem_are_no_problems_of_their_own(attempts, right, n):
    rights = [(str(at), mark == "+") for at, of in enumerate(attempts) for mark in of]
    assert wilson_over_problems(rights) == pytest.approx(wilson(right, n))


def test_tokens_of_one_episode_are_no_episodes_of_their_own():
    def episode(accepted, **tokens):
        return {"tokens": {"student_feedback": 50, **tokens}, "accepted": accepted}

    rows = [
        episode({"expert_feedback": 5, "merge": 1}, expert_feedback=10, merge=10),
        episode({"expert_feedback": 5}, expert_feedback=10, merge=10),
        {"tokens": {"expert_feedback": 99}},  # written together with others
        episode({"expert_feedback": 9}, expert_feedback=10),
        episode({"expert_feedback": 7}, expert_feedback=10),
    ]
    assert accepted_count(rows) == {"count": 27, "n": 50}
    found = acceptance(rows)
    assert list(found) == ["expert_feedback", "merge", "all"]
    feedback = found["expert_feedback"]
    assert [feedback[part]["value"] for part in ("whole", "first_half", "second_half")] == [
        0.65,
        0.5,
        0.8,
    ]
    assert [feedback[part]["n"] for part in ("whole", "first_half", "second_half")] == [4, 2, 2]
    # Kish: squares (-1.5)^2, (-1.5)^2, 2.5^2 and 0.5^2 of clusters of ten; 40^2 * 0.2275 / 11.
    size = 40**2 * 0.65 * 0.35 / 11
    ends = [feedback["whole"]["low"], feedback["whole"]["high"]]
    assert ends == pytest.approx(wilson(0.65 * size, size), abs=1e-4)
    assert found["merge"]["first_half"] == {"value": None, "low": None, "high": None, "n": 0}
    assert acceptance(rows[2:3]) == {} and accepted_count(rows[2:3])["n"] == 0


def test_summary_adds_up():
    episodes = [
        row(True, True, expert=0.5, student=0.0, trusted=True),
        row(False, True, expert=None),
        row(False, False, expert=-0.5, student=0.9, written=-0.3, trusted=True),
        row(False, True, alone=True, student=0.9),
    ]
    update = {"losses": {}, "total": 1.0, "gradient_norm": 1.0, "skipped": False, "tokens": 70}
    metrics = [
        {
            "batch": 0,
            "updates": [update, {**update, "skipped": True}],
            "frozen": False,
            "trust": trust(None),
            "distil_seconds": 0.5,
            "seconds": 2,
        },
        {
            "batch": 1,
            "updates": [],
            "frozen": True,
            "trust": trust(0.5),
            "distil_seconds": 0.0,
            "seconds": 1,
        },
    ]
    found = summarise(episodes, metrics, {"lm": 2.0}, {"lm": 1.0}, None)
    thawed = [metrics[1], {**metrics[0], "batch": 2}]
    again = summarise(episodes, thawed, {"lm": 2.0}, {"lm": 1.0}, None)
    assert again["updates"]["frozen_after_batch"] is None  # it learned again, to the end
    assert found["accuracy"]["first_answers"]["right"] == 1
    assert found["accuracy"]["final_answers"]["right"] == 3
    assert found["accuracy"]["final_answers"]["n"] == 4
    assert found["score_gap"] == {"first_half": 0.5, "second_half": 1.4, "n": 2}
    assert found["updates"] == {
        "batches": 1,
        "steps": 2,
        "skipped": 1,
        "tokens": 140,
        "frozen_after_batch": 2,
    }
    feedback = found["expert_feedback"]
    assert (feedback["asked"], feedback["not_asked"]) == (3, 1)
    assert feedback["trust"] == trust(0.5)
    # Each feedback that was not written counts as 20 tokens, those that were as what they took.
    assert feedback["share_saved"] == 0.25 and feedback["share_saved_second_half"] == 0.5
    assert (feedback["audits"]["n"], feedback["audits"]["disagreed"]) == (2, 1)
    assert (feedback["tokens_written"], feedback["tokens_saved"]) == (60, 20)
    assert feedback["accuracy_when_asked"]["right"] == 2
    assert feedback["accuracy_when_not_asked"] == {
        "right": 1,
        "n": 1,
        "interval": found["expert_feedback"]["accuracy_when_not_asked"]["interval"],
    }
    assert found["unreadable_scores"] == {"expert": 1, "student": 3}
    assert found["tokens"] == {"answer": 40, "expert_feedback": 60}
    assert found["seconds"] == {"answer": 2.0, "distil": 0.5, "total": 3}


def test_an_expert_that_was_told_the_answer_wrote_for_it_too():
    """What it says when asked again cost tokens, which the savings left out."""
    again = row(False, True)
    again["tokens"]["privileged_feedback"] = 40
    again["tokens"]["second_privileged_feedback"] = 10
    metrics = {
        "updates": [],
        "frozen": False,
        "trust": trust(None),
        "distil_seconds": 0,
        "seconds": 1,
    }
    episodes = [again, row(True, True), row(True, True, alone=True)]
    feedback = summarise(episodes, [{"batch": 0, **metrics}], {}, {}, None)["expert_feedback"]
    # Two first answers took 60 and 20 tokens, so that the third would have taken 40.
    assert (feedback["tokens_written"], feedback["tokens_saved"]) == (90, 40)
    assert feedback["share_saved"] == round(40 / 130, 4)


def test_an_empty_run_can_be_summed_up():
    found = summarise([], [], {}, {}, None)
    assert found["episodes"] == 0
    assert found["expert_feedback"]["tokens_saved"] == 0


def test_warnings():
    assert find_warnings([row(True, True, expert=None)] * 7) == {}
    assert set(find_warnings([row(True, True, expert=None)] * 8)) == {"unreadable"}
    assert set(find_warnings([row(True, True, expert=0.1 * n) for n in range(8)])) == set()
    assert set(find_warnings([row(True, True, expert=0.7)] * 8)) == {"alike"}
    good = [row(True, True, expert=0.1 * n) for n in range(8)]
    assert set(find_warnings([*good, *[row(1, 1, capped=["answer"])] * 3])) == {"capped"}
    assert set(find_warnings([*good, *[row(1, 1, capped=["second_answer"])] * 3])) == {"capped"}
    assert set(find_warnings([*good, *[row(1, 1, capped=["merge"])] * 3])) == set()
    assert set(find_warnings([row(1, 1, alone=True)] * 8)) == set()


def test_a_warning_where_revising_makes_answers_worse():
    good = [row(True, True, expert=0.1 * n) for n in range(-5, 5)]
    spoiled, mended = row(True, False, expert=0.3), row(False, True, expert=-0.3)
    assert find_warnings([*good, *[spoiled] * 7]) == {}  # of seven it may be chance
    found = find_warnings([*good, *[spoiled] * 9, mended])
    assert set(found) == {"spoiled"}
    assert "9 right first answers wrong and 1 wrong ones right" in found["spoiled"]
    # As many the one way as the other, or a few more.
    assert find_warnings([*good, *[spoiled] * 12, *[mended] * 8]) == {}
    assert find_warnings([*good, *[mended] * 9]) == {}
    # Where no right answer is known, nothing is.
    assert find_warnings([*good, *[row(None, None, expert=0.3)] * 9]) == {}


def test_without_gold_there_are_the_models_verdicts():
    episodes = [
        {**row(None, None, expert=0.5, student=0.2), "revised": "again", "critique": ""},
        {**row(None, None, expert=-0.5, student=0.2), "revised": "", "critique": "a slip"},
        # 0 is not above 0.
        {**row(None, None, expert=0.0, student=-0.2), "revised": "", "critique": ""},
        {**row(None, None, expert=None, student=0.9), "revised": "", "critique": ""},
        {**row(None, None, alone=True, student=0.9), "revised": "", "critique": ""},
    ]
    metrics = []
    found = summarise(episodes, metrics, {}, {}, None)
    assert found["accuracy"]["first_answers"]["n"] == 0
    assert found["expert_feedback"]["accuracy_when_asked"]["n"] == 0
    low, high = wilson(1, 3)
    assert found["verdicts"]["first_answers"] == {
        "right": 1, "n": 3, "interval": [round(low, 4), round(high, 4)],
    }  # fmt: skip
    assert (found["verdicts"]["agreement"]["right"], found["verdicts"]["agreement"]["n"]) == (2, 3)
    assert (found["verdicts"]["kept"], found["verdicts"]["revised"]) == (3, 2)
    assert "verdicts" not in summarise([row(True, True)], [], {}, {}, None)


def test_what_a_run_of_self_distillation_warns_of():
    def batch(n=8, entropy=0.5, finished=1.0, skipped=(False,)):
        updates = [{"skipped": one} for one in skipped]
        return {"attempts": {"n": n, "entropy": entropy, "finished": finished}, "updates": updates}

    def found(*metrics, before=(14, 32), now=(14, 32)):
        held_out = [share_of([True] * right + [False] * (n - right)) for right, n in (before, now)]
        return self_warnings(metrics, held_out, 1e-3, 512)

    assert found() == found(batch()) == found(batch(), batch(finished=0.875)) == {}
    # Wilson: 14 of 32 from 0.282, 5 of 32 to 0.318, 4 of 32 to 0.281.
    assert found(now=(5, 32)) == found(before=(0, 0), now=(0, 0)) == {}
    (text,) = found(now=(4, 32)).values()
    assert "of 32 held-out problems it answers 4 right, 14 before" in text
    assert "(--lora-rate 0.001 may be too high)" in text
    # 0.9 ln 512 is 5.61.
    assert found(batch(entropy=5.6)) == {}
    assert set(found(batch(), batch(entropy=5.7))) == {"uniform"}
    # Of fewer than eight attempts it may be chance; those of the batch before count, too.
    assert found(batch(n=7, entropy=6.0)) == {}
    assert set(found(batch(n=4, entropy=6.0), batch(n=4, entropy=6.0))) == {"uniform"}
    cut = batch(finished=0.5)
    assert found(cut) == {"cut": "4 of the last 8 attempts were cut at the token limit; "
                          "raise --max-answer-tokens"}  # fmt: skip
    assert set(found(batch(), cut)) == {"endless"}
    # A step that is left out now and then is what the check is for.
    assert found(batch(skipped=[True] * 7)) == {}
    assert found(batch(skipped=[True] * 7), batch(skipped=[False] + [True] * 7)) == {}
    assert set(found(batch(skipped=[True] * 7), batch(skipped=[True]))) == {"skipped"}
