import pytest

from mlx_fd import runs
from mlx_fd.config import GenerationOptions, override, preset
from mlx_fd.feedback.rows import episode_row, with_second
from mlx_fd.feedback.stages import Answered, Finished, Judged, StudentFeedback, Usage
from mlx_fd.models.conversation import Conversation
from mlx_fd.problems import Problem
from mlx_fd.problems.prompts import Answer, Feedback
from mlx_fd.report.reading import read_runs
from mlx_fd.runs.plan import make_plan as plan_of
from mlx_fd.training import answering
from mlx_fd.training.answering import Answering, observe, warmed
from support.loops import assert_same, rows, start
from support.pairs import make_dirs, make_plan

OPTIONS = GenerationOptions(answer_temperature=0.6, max_answer_temperature=0.85)


def temperatures(batches, options=OPTIONS):
    state, found = Answering(), []
    for right, wrong in batches:
        found.append(round(warmed(options, state).answer_temperature, 6))
        state = observe(state, [1.0] * right + [-0.8] * wrong + [None], options)
    return found


def test_the_temperature_rises_while_nearly_all_are_right_and_falls_while_nearly_all_are_wrong():
    nearly, mixed, wrong = (31, 1), (20, 12), (2, 30)
    assert temperatures([nearly, mixed, nearly, nearly, nearly, mixed]) == [
        *(0.6, 0.7, 0.7, 0.8, 0.85, 0.85)
    ]
    assert temperatures([nearly, nearly, wrong, wrong, wrong, mixed]) == [
        *(0.6, 0.7, 0.8, 0.7, 0.6, 0.6)
    ]
    # In small batches nothing is decided before there are enough.
    assert temperatures([(8, 0)] * 6) == [0.6, 0.6, 0.6, 0.6, 0.7, 0.7]
    assert temperatures([nearly] * 3, GenerationOptions(answer_temperature=0.6)) == [0.6] * 3


def test_both_answers_are_judged_and_learned_from_and_a_resumed_run_is_the_same(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(answering, "ENOUGH", 2)
    monkeypatch.setattr(answering, "NEARLY_ALL", 0.0)
    options = {
        "answers_by": "both",
        "answer_temperature": 0.5,
        "max_answer_temperature": 0.75,
        "trigger": "always",
        "replay": 0.5,
    }
    plan = make_plan(*make_dirs(tmp_path, layers=(2, 1)), **options, score_at="own", episodes=6)
    start(tmp_path / "whole", plan)
    for _ in range(2):
        answers = iter([False, True])
        assert start(tmp_path / "stopped", plan, stop=lambda a=answers: next(a)) is None
    start(tmp_path / "stopped", plan)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert all(row["second"]["gate"]["distilled"] for row in rows(tmp_path / "whole"))
    logged = runs.read_samples(tmp_path / "whole")
    assert [row["batch"] for row in logged] == [batch for batch in range(3) for _ in range(4)]


@pytest.mark.parametrize("first_cut", [False, True])
def test_what_was_cut_and_thought_on_both_answers_is_in_the_row(first_cut):
    def judged(cut, thought):
        usage = Usage({"answer": 64}, capped=cut, thoughts=thought, closed=tuple(thought))
        problem = Problem("p", "q", "s", "1")
        answered = Answered(problem, Answer("cut", None), Conversation(), (), usage)
        return Judged(answered, StudentFeedback(Feedback("x", 1.0), 0.5), None)

    first = judged(*((("answer",), {"answer": "hm"}) if first_cut else ((), {})))
    done = Finished(first, 0.9, "", "", "", first.answered.answer, first.usage)
    gate = {"distilled": True, "reason": "", "trusted": False}
    row = episode_row(done, 0, gate, None)
    found = with_second(row, judged(("answer", "student_feedback"), {"answer": "so"}), gate, None)
    own = ["answer"] if first_cut else []
    assert found["capped"] == [*own, "second_answer", "second_student_feedback"]
    assert found["thoughts"] == {**row.get("thoughts", {}), "second_answer": "so"}
    assert found["closed_thoughts"] == [*own, "second_answer"]
    plain = with_second(row, judged((), {}), gate, None)
    columns = ("capped", "thoughts", "closed_thoughts")
    assert [plain.get(name) for name in columns] == [row.get(name) for name in columns]


def test_the_student_answers_beside_the_expert(tmp_path):
    changes = {"answers_by": "both", "episodes": 8, "batch_size": 8, "probe_size": 2}
    # Nothing is revised, and nobody solves the problems that it judges.
    changes |= {"target_score": -1.0, "own_solutions": 0}
    plan = plan_of(override(preset("tiny"), {**changes, "exam_size": 0, "kd_steps": 1}, "test"))
    summary = start(tmp_path / "run", plan)
    found = rows(tmp_path / "run")
    assert sum(row["correct_before"] for row in found) == 8
    seconds = [row["second"] for row in found]
    assert 0 < sum(second["correct"] for second in seconds) < 8
    for row, second in zip(found, seconds, strict=True):
        if second["correct"]:
            assert second["expert_feedback"]["written_score"] > 0
        assert row["tokens"]["second_expert_feedback"] > 0
    once, twice = (
        sum(row["tokens"][f"{of}expert_feedback"] for row in found) for of in ("", "second_")
    )
    assert summary["expert_feedback"]["tokens_written"] == once + twice
    # The report's totals are of both answers, too.
    assert summary["expert_verdicts"]["known"] == 16
    [shown] = read_runs([tmp_path / "run"])
    assert shown.totals["expert_verdicts"] == summary["expert_verdicts"]
    metrics = rows(tmp_path / "run", runs.METRICS)
    assert [row["answer_temperature"] for row in metrics] == [pytest.approx(0.7)]
    # Of each problem two feedbacks are learned from, and the solution.
    assert metrics[0]["lagging"] > 8
