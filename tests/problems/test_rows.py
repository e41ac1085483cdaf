"""Data sets as they are published: small made-up files of the same shape."""

import decimal
import json
import math

import pytest

from mlx_fd.errors import UserError
from mlx_fd.problems import load
from mlx_fd.problems.kinds import is_right, read_final

OPEN_THOUGHTS = (
    "<|begin_of_thought|>maybe \\boxed{{7}}<|end_of_thought|>\n"
    "<|begin_of_solution|>{}<|end_of_solution|>"
)
CHOICES = ["red", "blue", "green", "white"]


def written(tmp_path, *rows, name="p.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def only(tmp_path, *rows, **options):
    return load(written(tmp_path, *rows), **options).problems


@pytest.mark.parametrize(
    ("row", "question", "kind", "answer"),
    [
        pytest.param(
            {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
            "2 + 3?", "number", "5", id="GSM8K",
        ),
        pytest.param(
            {"Body": "Ann has 3 pens.", "Question": "How many pens?", "Answer": 3.0},
            "Ann has 3 pens.\n\nHow many pens?", "number", "3", id="SVAMP",
        ),
        pytest.param(
            {"body": "Seven red apples and two green ones.", "question": "How many apples?",
             "answer": "9 (apples)", "formula": "7+2=9"},
            "Seven red apples and two green ones.\n\nHow many apples?", "number", "9", id="ASDiv",
        ),
        pytest.param(
            {"problem": "Where do they meet?", "solution": r"So it is $\boxed{(2,4)}$.",
             "answer": "(2,4)", "subject": "Algebra", "level": 3, "unique_id": "test/1.json"},
            "Where do they meet?", "math", "(2,4)", id="MATH-500",
        ),
        pytest.param(
            {"problem": "What is it?", "solution": r"So it is $\boxed{\sqrt{51}}$.", "level": "5"},
            "What is it?", "math", r"\sqrt{51}", id="MATH",
        ),
        pytest.param(
            {"id": 60, "problem": "Walk?", "solution": "...", "answer": "204", "year": "2024"},
            "Walk?", "number", "204", id="AIME",
        ),
        pytest.param(
            {"source": "cn_k12", "problem": "Find k.", "solution": r"Then $\boxed{2k}$ follows.",
             "messages": []},
            "Find k.", "math", "2k", id="NuminaMath",
        ),
        pytest.param(
            {"question": "Which?", "subject": "art", "choices": CHOICES, "answer": 2},
            "Which?\nA. red\nB. blue\nC. green\nD. white", "choice", "C", id="MMLU",
        ),
        pytest.param(
            {"id": "x1", "question": "Which?", "answerKey": "2",
             "choices": {"text": ["up", "down"], "label": ["1", "2"]}},
            "Which?\nA. up\nB. down", "choice", "B", id="ARC",
        ),
        pytest.param(
            {"id": "q", "question": "Which?", "question_concept": "c", "answerKey": "A",
             "choices": {"label": ["A", "B"], "text": ["up", "down"]}},
            "Which?\nA. up\nB. down", "choice", "A", id="CommonsenseQA",
        ),
        pytest.param(
            {"passage": "It rains.", "question": "Why?", "options": ["(A)so", "(B)no"],
             "label": "B", "answer": None},
            "It rains.\n\nWhy?\nA. so\nB. no", "choice", "B", id="AGIEval",
        ),
        pytest.param(
            {"passage": "Ann and Bob won.", "question": "Who won?",
             "answers_spans": {"spans": ["Ann", "Ann and Bob"], "types": ["span", "span"]}},
            "Ann and Bob won.\n\nWho won?", "text", "Ann", id="DROP",
        ),
        pytest.param(
            {"context": "Paris is a city.", "question": "What is a city?",
             "answers": {"text": ["Paris", "Paris"], "answer_start": [0, 0]}},
            "Paris is a city.\n\nWhat is a city?", "text", "Paris", id="SQuAD",
        ),
        pytest.param(
            {"qid": "1", "question": "Do fish fly?", "answer": False, "facts": []},
            "Do fish fly?", "text", "no", id="StrategyQA",
        ),
        pytest.param(
            {"question": "What is the capital of France?", "answer": "Paris"},
            "What is the capital of France?", "text", "Paris", id="names",
        ),
    ],
)  # fmt: skip
def test_published_shapes(tmp_path, row, question, kind, answer):
    (problem,) = only(tmp_path, row)
    assert (problem.question, problem.kind, problem.answer) == (question, kind, answer)


def test_several_right_answers_are_kept(tmp_path):
    row = {"question": "Who?", "answer": ["Ann", "Anna", "Ann"]}
    (problem,) = only(tmp_path, row)
    assert (problem.answer, problem.also_right) == ("Ann", ("Anna",))


def test_instances_of_one_template_are_problems_of_their_own(tmp_path):
    rows = [
        {"id": 1, "instance": place, "question": f"{place} + 1?", "answer": f"#### {place + 1}"}
        for place in range(4)
    ]
    assert [p.id for p in only(tmp_path, *rows)] == ["1-0", "1-1", "1-2", "1-3"]


def test_answers_that_say_none_are_missing(tmp_path):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(9)]
    rows.append({"question": "What is missing?", "answer": "None"})
    with pytest.raises(UserError, match=r"p\.jsonl:10: no 'answer'"):
        only(tmp_path, *rows)
    assert len(only(tmp_path, *rows, skip_bad_rows=True)) == 9


def test_one_row_does_not_change_the_kind_of_all(tmp_path):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(20)]
    rows.append({"question": "odd?", "answer": "unknown"})
    with pytest.raises(UserError, match=r"p\.jsonl:21: no final number in 'answer'"):
        only(tmp_path, *rows)


@pytest.mark.parametrize("column", ["solution", "answer"])
@pytest.mark.parametrize(
    "worked",
    [
        "He has 3. He buys 5 more, so 3+5=8 apples in the end. The answer is 8.",
        "He has 4 apples at first and then he buys 5 more of them, so that x = 9, which is odd",
    ],
)
def test_a_worked_solution_that_marks_no_answer_is_refused(tmp_path, column, worked):
    rows = [{"problem": f"{n}?", column: worked} for n in range(3)]
    with pytest.raises(UserError, match="does not say what it comes to"):
        only(tmp_path, *rows, kind="math")
    marked = [{**row, column: f"{worked}\n#### \\sqrt{{8}}"} for row in rows]
    assert {p.answer for p in only(tmp_path, *marked, kind="math")} == {r"\sqrt{8}"}


@pytest.mark.parametrize(
    "answer",
    [
        r"5 \text{ hours and } 30 \text{ minutes}", "x = 3 or x = -2", "No. There is none.",
        r"10 \text{ if } n \text{ is even and } 5 \text{ otherwise}", "(a) 3. (b) 4.",
        "between 2 and 3 inclusive",
    ],
)  # fmt: skip
def test_a_math_answer_may_have_words(tmp_path, answer):
    (problem,) = only(tmp_path, {"problem": "?", "answer": answer}, kind="math")
    assert is_right(read_final(f"#### {answer}", problem), problem)


def test_a_third_of_formulas_makes_all_of_them_formulas(tmp_path):
    answers = ["12", r"\sqrt{2}", "3", "(1,2)", "7", "8"]
    got = only(tmp_path, *({"problem": f"{a}?", "answer": a} for a in answers))
    assert {p.kind for p in got} == {"math"}
    assert [p.answer for p in got] == answers


@pytest.mark.parametrize(
    "answer",
    [
        r"\sqrt{51}", r"\frac{\sqrt{3}}{3}", "(2,4)", "(3,4]", r"(2,\infty)", r"7\pi", "2k",
        "y = -2x", r"\frac{20000}{\pi}", "n=-6,9", "1-i", r"\frac{5}{24r}", "2^{k}",
        "240/(x-2)-240/x=10", r"\{1,2\}", "x^2+1",
    ],
)  # fmt: skip
def test_no_number_is_pulled_out_of_a_formula(tmp_path, answer):
    (problem,) = only(tmp_path, {"problem": "?", "answer": answer})
    assert problem.kind == "math"
    with pytest.raises(UserError, match="no final number in 'answer'"):
        only(tmp_path, {"problem": "?", "answer": answer}, kind="number")


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18", "18"), ("$1,234.50", "2469/2"), ("3/4", "3/4"), ("1 1/2", "3/2"), ("18 eggs", "18"),
        ("9 (apples)", "9"), (r"\frac{270}{7}", "270/7"), ("50%", "50"), ("-0.5", "-1/2"),
        ("1,00,000", "100000"), ("12 sq. cm", "12"), ("5.", "5"),
        ("5 000", "5000"), ("12 500 eggs", "12500"),
        ("5 \u20ac", "5"), ("12,50 \u20ac", "25/2"), ("\u00a5500", "500"), ("500\u5143", "500"),
        ("18\u4e2a", "18"), ("5kg", "5"), ("\u00bd", "1/2"), ("3\n#### 5 \u20ac", "5"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(tmp_path, answer, value):
    (problem,) = only(tmp_path, {"question": "?", "answer": answer})
    assert (problem.kind, problem.answer) == ("number", value)


def test_columns_that_are_not_read_are_named(tmp_path):
    row = {"question": "3 + 5?", "answer": "8", "formula": "3+5=8", "level": 2, "hint": ""}
    found = load(written(tmp_path, row))
    assert found.unread == ("formula",)
    assert found.notes == (f"columns of {found.name} that are not read: 'formula'",)
    assert load(written(tmp_path, row), columns="context=formula").notes == ()


@pytest.mark.parametrize("column", ["image", "images", "decoded_image", "img", "image_1"])
def test_images_are_refused(tmp_path, column):
    row = {"question": "How many?", "answer": "3", column: "chart.png"}
    with pytest.raises(UserError, match=rf"has an image \('{column}'\); mlx-fd reads text only"):
        only(tmp_path, row)
    assert only(tmp_path, {**row, column: None})


def test_columns_can_be_named(tmp_path):
    path = written(tmp_path, {"text": "2 + 3?", "key": "5", "question": "not this"})
    (problem,) = load(path, columns="question=text, answer=key").problems
    assert (problem.question, problem.answer) == ("2 + 3?", "5")
    with pytest.raises(UserError, match="--columns: no row has a column 'texts'"):
        load(path, columns="question=texts,answer=key,context=text")
    with pytest.raises(UserError, match="'frage=text' is not one of question=NAME"):
        load(path, columns="frage=text")
    with pytest.raises(UserError, match="answer is there twice"):
        load(path, columns="answer=a,answer=b")


def test_a_kind_can_be_chosen(tmp_path):
    path = written(tmp_path, {"question": "How many?", "answer": "12"})
    assert load(path, kind="text").problems[0].kind == "text"
    with pytest.raises(UserError, match="no 'choices'"):
        load(path, kind="choice")


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ("red or blue", "'choices' is not a list of choices but text"),
        ("[1,", r"write \[\"red\", \"blue\"\], or a column for each"),
        (["red", ""], "'choices' has an empty choice"),
        ({"text": ["a", "b"], "label": ["A"]}, "2 choices, but 1 labels"),
        (["red", None], "'choices' has a choice that is not text but NoneType"),
        ([["red"], ["blue"]], "'choices' has a choice that is not text but list"),
        (["red", float("nan")], "'choices' has a choice that is not text but NaN"),
        ([{"value": "red"}, {"value": "blue"}], "a choice that is not text but dict"),
        (["caf\udce9", "tea"], "'choices' is not UTF-8 text"),
    ],
)
def test_odd_choices_are_refused(tmp_path, choices, reason):
    with pytest.raises(UserError, match=reason):
        only(tmp_path, {"question": "?", "choices": choices, "answer": 0})


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("question,A,B,C,answer", "Which?,red,blue,white,B"),
        ("question,option_a,option_b,option_c,answer", "Which?,red,blue,white,blue"),
        ("question,Choice A,Choice B,Choice C,answerKey", "Which?,red,blue,white,B"),
        ("question,choices,answer", 'Which?,"[""red"", ""blue"", ""white""]",B'),
        ("question,options,answer", "Which?,\"['red', 'blue', 'white']\",B"),
    ],
)
def test_choices_of_a_table(tmp_path, header, cells):
    (tmp_path / "p.csv").write_text(f"{header}\n{cells}\n")
    found = load(str(tmp_path / "p.csv"))
    (problem,) = found.problems
    assert (problem.kind, problem.answer, found.unread) == ("choice", "B", ())
    assert problem.question == "Which?\nA. red\nB. blue\nC. white"


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"choices": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}]}, "B"),
        ({"choices": [{"text": "red"}, {"text": "blue"}]}, "blue"),
        ({"option_a": "red", "option_b": "blue", "option_c": float("nan")}, "B"),
    ],
)
def test_choices_as_objects_and_as_pandas_leaves_them(tmp_path, row, answer):
    (problem,) = only(tmp_path, {"question": "Which?", **row, "answer": answer})
    assert problem.question == "Which?\nA. red\nB. blue"
    assert (problem.choices, problem.answer) == (("red", "blue"), "B")


@pytest.mark.parametrize("answer", ["A", "a", " A "])
def test_letters_of_columns_are_letters_whatever_the_choices_are(tmp_path, answer):
    row = {"question": "Scurvy?", "A": "C", "B": "A", "C": "D", "D": "K", "answer": answer}
    (problem,) = only(tmp_path, row)
    assert problem.answer == "A" and is_right(read_final("#### A", problem), problem)
    assert is_right(read_final(problem.solution, problem), problem)


def test_numbers_that_are_choices_texts_are_no_places_where_all_are(tmp_path):
    rows = [
        {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": 2},
        {"question": "2 - 1?", "choices": [3, 2, 1], "answer": 1},
    ]
    with pytest.raises(UserError, match="the text of one of its choices"):
        only(tmp_path, *rows)
    # One row among others may be so by chance.
    assert [one.answer for one in only(tmp_path, {**rows[0], "choices": CHOICES}, rows[0])] == [
        "C",
        "C",
    ]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (True, ("#### Yes", "#### True"), ("#### No", "#### False")),
        ("FALSE", ("#### False", "#### no"), ("#### True", "#### yes")),
        ("['Paris', 'City of Paris']", ("#### Paris", "#### the City of Paris"), ("#### Rome",)),
        ('["Paris"]', ("#### Paris",), ("#### Rome",)),
    ],
)
def test_truths_and_lists_that_are_text(tmp_path, answer, right, wrong):
    (problem,) = only(tmp_path, {"question": "?", "answer": answer})
    assert problem.kind == "text"
    assert all(is_right(read_final(reply, problem), problem) for reply in right)
    assert not any(is_right(read_final(reply, problem), problem) for reply in wrong)


def test_a_list_without_commas_is_no_text(tmp_path):
    # As NumPy writes it; Python would read one text, ParisLyon.
    with pytest.raises(UserError, match="looks like a list of texts"):
        only(tmp_path, {"question": "?", "answer": "['Paris' 'Lyon']"})


def test_narrow_floats_of_parquet_are_what_they_are_written_as(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"question": ["?", "??"], "answer": pa.array([0.1, 2.0], pa.float32())})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [one.answer for one in load(str(tmp_path / "p.parquet")).problems] == ["1/10", "2"]


@pytest.mark.parametrize("column", ["id", "option_a"])
def test_what_is_no_utf8_is_named_with_its_place(tmp_path, column):
    head = f"question,answer,{column},option_b".encode()
    (tmp_path / "p.csv").write_bytes(head + b"\nWhich?,tea,caf\xe9,tea\n")
    with pytest.raises(UserError, match=f"{column}.*is not UTF-8 text"):
        load(str(tmp_path / "p.csv"))


def test_columns_of_letters_are_no_choices_where_no_letter_answers(tmp_path):
    row = {"question": "a + b?", "a": 3, "b": 5, "answer": 8}
    (problem,) = only(tmp_path, row)
    assert (problem.kind, problem.choices) == ("number", ())


@pytest.mark.parametrize(
    ("header", "question"),
    [(",question,answer", "0,How many?,5"), ("Unnamed: 0,question,answer", "0,How many?,5"),
     ("question;answer", "How many?;5"), ("question\tanswer", "How many?\t5")],
)  # fmt: skip
def test_tables_as_pandas_and_spreadsheets_write_them(tmp_path, header, question):
    (tmp_path / "p.csv").write_text(f"{header}\n{question}\n")
    found = load(str(tmp_path / "p.csv"))
    (problem,) = found.problems
    assert (problem.question, problem.answer, found.unread) == ("How many?", "5", ())


def test_an_answer_beside_a_chat_is_gold(tmp_path):
    asked = [{"role": "user", "content": "The capital of Italy?"}]
    reply = {"role": "assistant", "content": "That would be Rome."}
    (one,) = only(tmp_path, {"prompt": asked, "answer": "Rome"})
    (two,) = only(tmp_path, {"messages": [*asked, reply], "answer": "Rome"})
    assert {(p.kind, p.answer) for p in (one, two)} == {("text", "Rome")}
    with pytest.raises(UserError, match="'reward_model'; name what they are"):
        only(tmp_path, {"prompt": asked, "reward_model": {"ground_truth": "Rome"}})


@pytest.mark.parametrize(
    ("answers", "kind", "right"),
    [
        (["5", 5.5], "number", "11/2"),
        ([r"2\sqrt{3}", "3"], "math", "3"),
        (["5", "five"], "text", "five"),
    ],
)
def test_a_list_of_answers_is_of_their_kind_and_each_is_right(tmp_path, answers, kind, right):
    (problem,) = only(tmp_path, {"question": "?", "answer": answers})
    assert problem.kind == kind
    assert is_right(right, problem)


def test_choices_counted_from_one_are_refused_even_with_bad_rows_skipped(tmp_path):
    rows = [{"question": "?", "choices": CHOICES, "answer": place} for place in (1, 4, 2)]
    with pytest.raises(UserError, match="seem to count from 1"):
        only(tmp_path, *rows, skip_bad_rows=True)
    with pytest.raises(UserError, match="'answer' names several choices"):
        only(tmp_path, {"question": "?", "choices": CHOICES, "answer": ["A", "C"]})


@pytest.mark.parametrize(
    ("row", "solution"),
    [
        ({"choices": ["up", "down"], "answer": 1}, "#### B"),
        ({"choices": {"text": ["up", "down"], "label": ["1", "2"]}, "answer": "2"}, "#### B"),
        ({"choices": ["up", "down"], "answer": "B"}, "#### B"),
        ({"choices": ["up", "down"], "answer": "down"}, "#### B"),
        ({"choices": ["up", "down"], "answer": "(b) Down"}, "#### B"),
        ({"choices": ["up", "down"], "answer": "B) since it falls"}, "B) since it falls"),
        ({"choices": ["up", "down"], "answer": "So it is #### B"}, "So it is #### B"),
        ({"answer": "Ann"}, "#### Ann"),
        ({"answer": "48"}, "#### 48"),
        ({"answer": 0.5}, "#### 0.5"),
        ({"answer": "18 eggs"}, "#### 18 eggs"),
        ({"answer": "So \\boxed{48}"}, "So \\boxed{48}"),
        ({"answer": "#### 48"}, "#### 48"),
    ],
)
def test_an_answer_alone_is_a_solution_that_ends_as_replies_do(tmp_path, row, solution):
    (problem,) = only(tmp_path, {"question": "?", **row})
    assert problem.solution == solution
    assert is_right(read_final(problem.solution, problem), problem)


@pytest.mark.parametrize("answer", ["8.5", "8.50", 8.5])
def test_lm_eval_compares_the_gold_as_it_is_published(tmp_path, answer):
    from mlx_fd.problems import parsing

    (problem,) = only(tmp_path, {"question": "17 for 2?", "answer": answer})
    assert problem.answer == "17/2"
    gold = f"#### {problem.published}"
    assert parsing.lm_eval_match(f"17 / 2\n#### {problem.published}", gold, "strict")
    assert not parsing.lm_eval_match("#### 17/2", gold, "strict")


@pytest.mark.parametrize(
    ("row", "kind", "answer"),
    [
        ({"solution": "<think>\n\\boxed{5}?\n</think>\n\nIt is \\boxed{4}."}, "number", "4"),
        ({"answer": "<think>\n#### 7?\n</think>\n\n#### 5"}, "number", "5"),
        ({"answer": "<think>\nRome?\n</think>\n\nParis"}, "text", "Paris"),
        ({"solution": "<think>\n\\boxed{2k}?\n</think>\n\n\\boxed{3k}"}, "math", "3k"),
        ({"answer": "<think>\n\\boxed{A}?\n</think>\n\nB", "choices": CHOICES}, "choice", "B"),
        ({"output": "<think>\n\\boxed{5}?\n</think>\n\n\\boxed{4}"}, "number", "4"),
        ({"answer": "<think>3*4</think><answer>12</answer>"}, "number", "12"),
        ({"answer": "<think>A?</think><answer>B</answer>", "choices": CHOICES}, "choice", "B"),
        ({"answer": OPEN_THOUGHTS.format("It is \\boxed{8}.")}, "number", "8"),
        ({"response": OPEN_THOUGHTS.format("It is \\boxed{8}.")}, "number", "8"),
        # Under headings, and in prose.
        (
            {"solution": "#### Step 1: Do\nx = 4 - 1\n\n#### Step 2: Go\nso $\\boxed{3}$."},
            "number",
            "3",
        ),
        ({"solution": "#### Step 1: Do\n\n#### Step 2: Go\nso $\\boxed{2k}$."}, "math", "2k"),
        ({"answer": "3+5=8\n#### 8\nDone."}, "number", "8"),
        ({"answer": "3+5=8\nAnswer: 8"}, "number", "8"),
        # No traces, but they have a box, too.
        ({"solution": "So it is \\boxed{Paris}."}, "text", "Paris"),
        ({"answer": "So it is \\boxed{B}.", "choices": CHOICES}, "choice", "B"),
    ],
)
def test_a_gold_is_what_a_trace_says_and_not_what_it_thinks(tmp_path, row, kind, answer):
    (problem,) = only(tmp_path, {"question": "Which?", **row})
    assert (problem.kind, problem.answer) == (kind, answer)
    assert is_right(read_final(problem.solution, problem), problem)
    text = row.get("solution") or row.get("output")
    assert text is None or problem.solution == text


def test_what_is_only_thought_is_no_gold_in_any_familys_marks(tmp_path):
    (problem,) = only(tmp_path, {"question": "?", "response": OPEN_THOUGHTS.format("It's eight.")})
    assert (problem.kind, problem.answer) == ("none", "")


def test_a_heading_is_no_gold(tmp_path):
    rows = [{"question": f"{n}?", "answer": "#### Conclusion\nIt is clear."} for n in range(3)]
    with pytest.raises(UserError, match=r"p\.jsonl:1: the last '####' of 'answer' has words"):
        only(tmp_path, *rows)


@pytest.mark.parametrize("column", ["answer", "solution"])
def test_a_trace_that_is_cut_off_in_its_thought_has_no_gold(tmp_path, column):
    cut = {"question": "Which?", column: "<think>\nSo \\boxed{3}? Wait"}
    with pytest.raises(UserError, match=r"p\.jsonl:1: no 'answer'"):
        only(tmp_path, cut)
    whole = {"question": "And this?", column: "<think>\n\\boxed{3}?\n</think>\n\n\\boxed{4}"}
    (problem,) = only(tmp_path, cut, whole, skip_bad_rows=True)
    assert (problem.kind, problem.answer) == ("number", "4")


@pytest.mark.parametrize("blank", ["", " ", None])
def test_a_blank_solution_beside_an_answer_is_none(tmp_path, blank):
    rows = [
        {"question": "1 + 1?", "answer": "2", "solution": blank},
        {"question": "2 + 2?", "answer": "4", "solution": "2 + 2 = 4"},
    ]
    assert [one.solution for one in only(tmp_path, *rows)] == ["#### 2", "2 + 2 = 4"]
    path = tmp_path / "p.csv"
    path.write_text(f"question,answer,solution\n1 + 1?,2,{blank or ''}\n2 + 2?,4,2 + 2 = 4\n")
    assert [one.solution for one in load(str(path)).problems] == ["#### 2", "2 + 2 = 4"]
    with pytest.raises(UserError, match="'solution' is empty"):
        only(tmp_path, {"question": "1 + 1?", "solution": ""})


@pytest.mark.parametrize(
    ("row", "answer", "unread"),
    [
        ({"answer": "5", "label": "9"}, "5", ("label",)),
        ({"answer": None, "label": "9"}, "9", ()),
        ({"answer": "So she has five.", "final_answer": "5"}, "5", ("answer",)),
        ({"answer": "5", "final_answer": ""}, "5", ()),
        ({"answer": "5", "solution": "2 + 3 = 5", "explanation": "why"}, "5", ("explanation",)),
        ({"answer": "5", "gold": float("nan"), "rationale": "why"}, "5", ()),
    ],
)
def test_of_several_columns_for_one_thing_those_that_are_not_read_are_named(
    tmp_path, row, answer, unread
):
    found = load(written(tmp_path, {"question": "How many?", **row}))
    assert (found.problems[0].answer, found.unread) == (answer, unread)


def test_a_column_that_was_named_is_the_one_that_is_read(tmp_path):
    row = {"question": "How many?", "answer": "So she has five.", "final_answer": "5"}
    path = written(tmp_path, {**row, "label": "7"})
    found = load(path, columns="answer=label,solution=answer")
    assert (found.problems[0].answer, found.unread) == ("7", ("final_answer",))
    assert found.problems[0].solution == "So she has five."


@pytest.mark.parametrize(
    ("row", "kind", "answer"),
    [
        pytest.param(
            {"question": "Which is even?", "options": ["3", "4", "5", "7"], "correct": "B",
             "explanation": "(A) is odd. (C) and (D) are odd, too. So (B)."},
            "choice", "B", id="correct",
        ),
        pytest.param(
            {"question": "3 * 4?", "correct_answer": "12", "explanation": "Multiply 3 by 4."},
            "number", "12", id="correct_answer",
        ),
        pytest.param(
            {"Question": "3 * 4?", "Correct Answer": "12", "Explanation": "Multiply.",
             "Incorrect Answer 1": "13"},
            "number", "12", id="GPQA as published",
        ),
        pytest.param(
            {"question": "3 * 4?", "answer": "13", "ground_truth": "12"},
            "number", "12", id="an answer that was judged",
        ),
        pytest.param(
            {"question": "3 * 4?", "explanation": "It is 12.\n#### 12"},
            "number", "12", id="an explanation that marks its answer",
        ),
        pytest.param(
            {"question": "Where do they meet?", "solution": ["So $(2,4)$.\n#### (2,4)"],
             "final_answer": ["$(2,4)$"]},
            "math", "(2,4)", id="OlympiadBench",
        ),
        pytest.param(
            {"input": "not ( True ) is", "target": "False"},
            "text", "False", id="BIG-Bench Hard",
        ),
    ],
)  # fmt: skip
def test_the_answer_is_where_a_column_says_so(tmp_path, row, kind, answer):
    (problem,) = only(tmp_path, row)
    assert (problem.kind, problem.answer) == (kind, answer)


def test_an_explanation_that_marks_nothing_is_no_answer(tmp_path):
    row = {"question": "Which?", "explanation": "(A) is odd. So (B).", "key": "B"}
    with pytest.raises(UserError, match=r"no row has an answer|no 'answer'"):
        only(tmp_path, row)
    # Nor is a whole solution, where another column may have it.
    row = {"question": "Which?", "solution": "Odd ones fall away", "key": "B"}
    with pytest.raises(UserError, match=r"no column has the answer alone.*'key'.*answer=NAME"):
        only(tmp_path, row)
    (problem,) = only(tmp_path, row, columns="answer=key")
    assert (problem.answer, problem.solution) == ("B", "Odd ones fall away")
    (problem,) = only(tmp_path, {"question": "Which?", "solution": "the odd one"})
    assert problem.answer == "the odd one"
    with pytest.raises(UserError, match=r"no row has an answer|no 'answer'"):
        only(tmp_path, {"question": "Which?", "answer_text": "a reply", "correct": True})


CITIES = ["Rome", "Paris", "Bonn", "Oslo"]


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (["option1", "option2", "option3", "option4"], "2"),
        (["option_1", "option_2", "option_3", "option_4"], 2),
        (["choice0", "choice1", "choice2", "choice3"], 1),
        (["Choice 1", "Choice 2", "Choice 3", "Choice 4"], "Paris"),
        (["opa", "opb", "opc", "opd"], 1),
        (["A", "B", "C", "D"], "B"),
        (["A", "B", "C", "D"], "Paris"),
        (["A", "B", "C", "D"], 1),
        (["a", "b", "c", "d"], "Paris"),
        (["option_a", "option_b", "option_c", "option_d"], "1"),
    ],
)
def test_a_column_for_each_choice(tmp_path, names, answer):
    row = {"question": "Capital?", **dict(zip(names, CITIES, strict=True)), "answer": answer}
    (problem,) = only(tmp_path, row)
    assert (problem.kind, problem.answer) == ("choice", "B")
    assert problem.question == "Capital?\nA. Rome\nB. Paris\nC. Bonn\nD. Oslo"


def test_columns_of_letters_that_cannot_be_choices(tmp_path):
    letters = dict(zip("ABCD", CITIES, strict=True))
    with pytest.raises(UserError, match="columns A, B, C, D look like choices, but the answer"):
        only(tmp_path, {"question": "Capital?", **letters, "answer": "Lyon"})
    with pytest.raises(UserError, match="none of the choices 1, 2"):
        only(tmp_path, {"question": "Which?", "option1": "x", "option2": "y", "answer": 0})
    # The numbers of a sum are no choices.
    (problem,) = only(tmp_path, {"question": "a + b?", "a": 3, "b": 4, "answer": 7})
    assert (problem.kind, problem.answer, problem.choices) == ("number", "7", ())


def test_places_in_a_spreadsheet_count_from_0(tmp_path):
    path = tmp_path / "p.csv"
    listed = json.dumps(CITIES).replace('"', '""')

    def of(*answers):
        rows = "".join(f'q{n},"{listed}",{answer}\n' for n, answer in enumerate(answers))
        path.write_text("question,choices,answer\n" + rows)
        return [problem.answer for problem in load(str(path)).problems]

    assert of(0, 1, 3) == ["A", "B", "D"]
    with pytest.raises(UserError, match="seem to count from 1"):
        of(1, 2, 4)


@pytest.mark.parametrize("nothing", [math.nan, None, [], "", " "])
def test_blank_choices_and_context_are_none(tmp_path, nothing):
    row = {"question": "2+3?", "answer": "5"}
    (problem,) = only(tmp_path, {**row, "choices": nothing, "context": nothing, "input": nothing})
    assert (problem.kind, problem.question, problem.answer) == ("number", "2+3?", "5")


@pytest.mark.parametrize(
    "odd", [4, True, {"label": 3, "text": ["a", "b"]}, {"text": 1, "label": []}]
)
def test_odd_choices_are_refused_by_line(tmp_path, odd):
    with pytest.raises(UserError, match=r"p\.jsonl:1: 'options'"):
        only(tmp_path, {"question": "2+3?", "answer": "5", "options": odd})


def test_labels_and_keys_of_choices(tmp_path):
    # Parquet gives every row the keys of all.
    (problem,) = only(
        tmp_path, {"question": "?", "choices": {"A": "x", "B": "y", "C": None}, "answer": "B"}
    )
    assert (problem.answer, problem.choices) == ("B", ("x", "y"))
    labelled = {"text": ["up", "down", "left"], "label": ["1", "2", "3"]}
    found = only(
        tmp_path,
        *({"question": f"{n}?", "choices": labelled, "answer": n} for n in (1, 2, 3)),
    )
    assert [problem.answer for problem in found] == ["A", "B", "C"]


@pytest.mark.parametrize("column", ["input", "passage"])
def test_a_column_that_is_named_is_not_read_twice(tmp_path, column):
    row = {column: "not ( True ) is", "target": "False"}
    (problem,) = only(tmp_path, row, columns=f"question={column},answer=target")
    assert problem.question == "not ( True ) is"


def test_decimals_of_a_table(tmp_path):
    import datasets

    path = tmp_path / "p.parquet"
    prices = [decimal.Decimal("12.50"), decimal.Decimal("3.00")]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("decimal128(6, 2)")}
    )
    table = datasets.Dataset.from_dict({"question": ["a?", "b?"], "answer": prices}, features)
    table.to_parquet(path)
    assert [one.answer for one in load(str(path)).problems] == ["25/2", "3"]


def test_conversations_as_sharegpt_has_them(tmp_path):
    (problem,) = only(
        tmp_path,
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "What is 3 + 5?"},
                {"from": "gpt", "value": "It is 8."},
            ]
        },
    )
    assert (problem.question, problem.solution) == ("Be short.\n\nWhat is 3 + 5?", "It is 8.")
    assert problem.kind == "none"
