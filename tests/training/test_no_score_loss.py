"""A run without the loss ``score``: nothing teaches the score head, so that it has no say."""

import json

import pytest

from mlx_fd.feedback.judge import locate_model, open_student
from mlx_fd.feedback.stages import combined_score
from support.loops import rows
from support.shell import failed, shell


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "no-score"
    done = shell(
        *("loop", "--preset", "tiny", "--losses", "lm,logit", "--episodes", "8"),
        *("--batch-size", "4", "--kd-steps", "1", "--probe-size", "2", "--exam-size", "2"),
        *("--quiet", "--out", str(folder)),
        cwd=folder.parent,
    )
    assert done.status == 0, done
    return folder


def test_the_written_score_counts_in_its_place(run):
    for row in rows(run):
        student, expert = row["student_feedback"], row["expert_feedback"]
        assert student["head_score"] is None
        both = expert["written_score"], student["written_score"]
        assert row["score"] == combined_score(*both, weight=0.65)
        # Two models that call an answer right keep it: a head of zeros would have had it revised.
        if both == (1, 1):
            assert not row["revised"]
        assert "score gap" not in row["gate"]["reason"]


def test_nobody_takes_the_untaught_head_for_a_judge(run):
    ref = locate_model(str(run))
    assert not ref.scores
    [judged] = open_student(ref).judge([("What is 2 + 3?", "#### 5")], max_tokens=32)
    assert judged.head_score is None
    done = shell(
        "cascade", "calibrate", str(run), "--score", "head", "--cost", "0.5", cwd=run.parent
    )
    failed(done, "needs a trained score head", status=2)
    done = shell("report", str(run), cwd=run.parent)
    assert done.status == 0, done
    summary = json.loads((run / "summary.json").read_text())
    assert summary["judging"]["head"] is None or summary["judging"]["head"]["n"] == 0


def test_its_card_is_that_of_the_loop(run, tmp_path):
    """It was taken for a model that learned from itself, and the export failed."""
    done = shell("export", str(run), "--out", "out", "--no-parity", cwd=tmp_path)
    assert done.status == 0, done
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| expert | `tiny` |" in card and "| losses | lm, logit (KL forward" in card
    assert "| lm loss, held out |" in card and "exam: problems solved" in card
    # Of a head that no loss taught an error was shown, before and after.
    assert "learned from itself" not in card and "score head" not in card
    assert not (tmp_path / "out" / "score_head.safetensors").exists()
