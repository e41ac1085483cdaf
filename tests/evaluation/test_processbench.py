import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fd.errors import UserError
from mlx_fd.evaluation import processbench
from mlx_fd.evaluation.statistics import paired_bootstrap
from mlx_fd.problems import arithmetic
from mlx_fd.problems.sources.arithmetic import questions
from support.steps import processbench_items, to_json_lines

ROW = {
    "id": "gsm8k-0",
    "generator": "a model",
    "problem": "Two and three, doubled?",
    "steps": ["2 + 3 = 5.", "5 * 2 = 11.", "The answer is \\boxed{11}."],
    "final_answer_correct": False,
    "label": 1,
}


# ------------------------------------------------------------------------------------------ files


def test_their_files_are_arrays_and_may_be_lines(tmp_path):
    other = {**ROW, "id": "gsm8k-1", "label": -1}
    array, lines = tmp_path / "gsm8k.json", tmp_path / "gsm8k.jsonl"
    array.write_text(json.dumps([ROW, other], indent=2))
    lines.write_text("".join(json.dumps(row) + "\n" for row in (ROW, other)))
    items = processbench.read(array)
    assert items == processbench.read(lines)
    assert items[0].steps == tuple(ROW["steps"]) and items[0].label == 1
    assert items[1].label == processbench.ALL_RIGHT
    lines.write_text(to_json_lines(items))
    assert items == processbench.read(lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": 3}, "'label' 3 is not from -1 to 2"),
        ({"label": -2}, "'label' -2"),
        ({"label": True}, "'label' is not a whole number but bool"),
        ({"label": 1.0}, "'label' is not a whole number but float"),
        ({"steps": []}, "'steps' is not a list of texts"),
        ({"steps": ["a", 1]}, "'steps' is not a list of texts"),
        ({"steps": "a"}, "'steps' is not a list but str"),
        ({"final_answer_correct": 0}, "'final_answer_correct' is not true or false"),
        ({"id": "gsm8k-0"}, "'gsm8k-0' is there a second time"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, change, said):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "id": "gsm8k-1", **change}))
    with pytest.raises(UserError, match=r"set\.jsonl:3: ") as raised:
        processbench.read(path)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "has no item"),
        ("  ", "is empty"),
        ('[{"id": "a"}]', "set.json:1: no 'generator'"),
        ("[1]", "set.json:1: not an object"),
        ('[{"id": ', "set.json:1: not JSON"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        processbench.read(path)
    assert said in str(raised.value)


_FIELD = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text() | st.integers())


@settings(max_examples=40)
@given(_FIELD | st.fixed_dictionaries({}, optional=dict.fromkeys(ROW, _FIELD)))
def test_any_json_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("fuzz") / "set.json"
    path.write_text(json.dumps([value]))
    try:
        (item,) = processbench.read(path)
    except UserError as error:
        assert f"{path}:1: " in str(error)
    else:
        assert -1 <= item.label < len(item.steps)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(ROW).encode().replace(b"doubled", b"\xff"))
    with pytest.raises(UserError, match=r"set\.jsonl:1: not UTF-8"):
        processbench.read(path)


# ---------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("so \\boxed{2}", 2),
        ("\\boxed{-1}", -1),
        ("first \\boxed{0}, no: \\boxed{ 3 }.", 3),
        ("\\boxed{1} and \\boxed{none}", None),
        ("\\boxed{1} and \\boxed{2", 1),
        ("\\boxed{}", None),
        ("paragraph 2", None),
        ("", None),
        ("\\boxed{1.0}", None),
        ("\\boxed{paragraph_1}", None),
    ],
)
def test_the_last_box_counts(text, step):
    assert processbench.predicted_step(text) == step


def test_a_long_text_is_read_at_once():
    """100,000 boxes that are never closed are not tried one after the other."""
    assert processbench.predicted_step("\\boxed{" * 100_000) is None
    assert processbench.predicted_step("\\boxed{4}" + "\\boxed{" * 100_000) == 4


def test_the_prompt_has_every_step_with_its_index():
    prompt = processbench.critique_prompt(processbench._item(ROW))
    for k, step in enumerate(ROW["steps"]):
        assert f"<paragraph_{k}>\n{step}\n</paragraph_{k}>" in prompt
    assert ROW["problem"] in prompt and "\\boxed{-1}" in prompt


# ---------------------------------------------------------------------------------------- numbers


def columns(predicted, labels):
    """1 where a critic names the label, and 1 where the solution is wrong."""
    hits = [named == label for named, label in zip(predicted, labels, strict=True)]
    return np.array(hits, float), np.array([label != -1 for label in labels], float)


def f1(predicted, labels):
    return processbench.f1(*columns(predicted, labels))


def test_f1_by_hand():
    """Of four wrong solutions three are found, of two right ones one; the unread one counts."""
    found, wrong = columns([0, 2, 1, None, -1, 0], [0, 2, 1, 1, -1, -1])
    assert found.tolist() == [1, 1, 1, 0, 1, 0] and wrong.tolist() == [1, 1, 1, 1, 0, 0]
    assert processbench.f1(found, wrong) == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_a_critic_that_says_the_same_of_everything_has_no_f1():
    assert f1([-1] * 4, [0, 1, -1, -1]) == 0.0
    assert math.isnan(f1([0, 1], [0, 1])) and math.isnan(f1([-1], [-1]))


def test_two_critics_are_compared_on_the_same_solutions():
    labels = [0, 1, -1, -1] * 20
    good, wrong = columns(labels, labels)
    bad, _ = columns([0] * 80, labels)
    difference, p = paired_bootstrap(good, bad, processbench.f1, [wrong])
    assert difference.value == 1.0 and p < 0.01


# --------------------------------------------------------------------------- generated solutions


def test_generated_solutions_have_their_first_error_at_the_label():
    items = processbench_items(questions(200, seed=3))
    assert len({item.id for item in items}) == 200
    labels = np.array([item.label for item in items])
    assert (labels == -1).sum() == 100 and set(labels[1::2]) >= {0, 1, 2}
    for item in items:
        if item.label == -1:
            assert item.final_answer_correct
        else:
            # What stands before the label is as the right solution has it; the rest need not be.
            assert all(step.startswith(f"Step {k + 1}: ") for k, step in enumerate(item.steps[:-1]))
    at_the_end = [item for item in items if item.label == len(item.steps) - 1]
    assert at_the_end and all(item.steps[-1].startswith("####") for item in at_the_end)


def test_the_right_feedback_has_an_f1_of_1_and_a_careless_one_of_0():
    exam = questions(60, seed=4)
    labels = [item.label for item in processbench_items(exam)]

    def score(feedback):
        said = [feedback(q.problem.solution, q.answer) for q in exam]
        # ProcessBench counts the steps from 0, and -1 is all right.
        return columns([arithmetic.first_error(text) - 1 for text in said], labels)

    assert processbench.f1(*score(arithmetic.feedback_text)) == 1.0
    found, wrong = score(lambda *texts: arithmetic.careless_feedback(*texts).text)
    assert (found == 1 - wrong).all() and processbench.f1(found, wrong) == 0.0
    assert arithmetic.first_error("It looks right to me.") is None
