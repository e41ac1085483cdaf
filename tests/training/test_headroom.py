"""The headroom check: is there something to distil, and who judges better?"""

import pytest

from mlx_fd.models.backend import backend

backend()

from mlx_fd import problems  # noqa: E402
from mlx_fd.config import override, preset  # noqa: E402
from mlx_fd.feedback.asking import derive_seed  # noqa: E402
from mlx_fd.feedback.pair import load_pair  # noqa: E402
from mlx_fd.feedback.turns import first_answers  # noqa: E402
from mlx_fd.training.probe import Headroom, load_probe, make_probe, save_probe  # noqa: E402


def headroom(expert, student, answers=(31, 20)):
    """A check on 32 problems; a judge is what it finds and passes of how many wrong and right."""
    row = {}
    for who, (found, wrong, passed, right) in (("expert", expert), ("student", student)):
        row[f"{who}_on_wrong"] = {"count": found, "n": wrong}
        row[f"{who}_on_right"] = {"count": passed, "n": right}
    totals = [(found + passed, wrong + right) for found, wrong, passed, right in (expert, student)]
    (expert_well, expert_of), (student_well, student_of) = totals
    return Headroom(
        32, *answers, expert_of, expert_well, student_of, student_well, judged=row
    ).concerns()


def test_a_student_that_finds_every_answer_right_is_no_judge():
    # Of all answers it judges 21 of 32 well and the expert no more; but it finds no error.
    assert headroom((10, 11, 11, 21), (0, 11, 21, 21)) == []
    # Likewise where most answers are right: 28 of 32 against 27.
    assert headroom((4, 4, 23, 28), (0, 4, 28, 28)) == []
    # Nor is one that finds every answer wrong.
    assert headroom((9, 11, 19, 21), (11, 11, 0, 21)) == []


@pytest.mark.parametrize(
    ("expert", "student"),
    [
        ((8, 10, 5, 22), (0, 10, 22, 22)),  # 0.51 against 0.5
        ((9, 10, 6, 22), (0, 10, 22, 22)),  # 0.59: less than a tenth better
        ((10, 10, 22, 22), (10, 10, 22, 22)),
        ((0, 0, 32, 32), (0, 0, 32, 32)),  # all answers right: nothing shows who finds errors
    ],
)
def test_an_expert_that_judges_hardly_better_is_a_concern(expert, student):
    (concern,) = headroom(expert, student)
    assert "hardly better than the student's" in concern
    assert f"the expert finds {expert[0]} of {expert[1]} wrong answers" in concern


def test_no_verdict_that_could_be_read_is_another_concern():
    (concern,) = headroom((0, 0, 0, 0), (0, 10, 22, 22))
    assert "could be read in 0 of 32" in concern


def test_an_expert_that_answers_no_better_is_a_concern():
    (concern,) = headroom((11, 11, 21, 21), (0, 11, 21, 21), answers=(20, 20))
    assert "there may be nothing to learn at answering" in concern


def test_right_and_wrong_answers_are_counted_apart(tmp_path):
    config = override(
        preset("tiny"),
        {"batch_size": 8, "losses": ("lm",), "own_solutions": 0, "student": "tiny-student"},
        "test",
    )
    pair = load_pair("tiny", "tiny-student")
    chosen = problems.load("arithmetic", "validation").problems[:16]
    probe = make_probe(pair, chosen, config, lambda step, tokens: None)
    judged = probe.headroom.judged
    assert judged is not None
    right = 0
    for number in range(2):
        seed = derive_seed(config.episode.seed, number, "probe/answer")
        chunk = chosen[number * 8 : number * 8 + 8]
        answers = first_answers(pair, chunk, config.generation, seed, lambda *_: None)
        right += sum(bool(one.is_correct) for one in answers)
    assert 0 < right < 16
    # The expert is right about all of them; the student finds nearly all of them right.
    assert judged["expert_on_wrong"] == {"count": 16 - right, "n": 16 - right}
    assert judged["expert_on_right"] == {"count": right, "n": right}
    assert judged["student_on_right"] == {"count": right, "n": right}
    assert judged["student_on_wrong"]["n"] == 16 - right
    assert judged["student_on_wrong"]["count"] <= 2
    well = judged["student_on_wrong"]["count"] + judged["student_on_right"]["count"]
    assert probe.headroom.student_judged_right == well
    assert probe.headroom.concerns() == []
    save_probe(probe, tmp_path)
    again, _ = load_probe(tmp_path)
    assert again.headroom == probe.headroom
