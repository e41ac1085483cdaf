"""What is read from a reply of each kind, and what is right."""

import os
import shutil
import signal
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, ProblemSet, load, math_worker
from mlx_fd.problems.kinds import (
    KINDS,
    are_graded,
    form_of,
    is_right,
    known,
    read_final,
    same_final,
    votes,
)
from mlx_fd.problems.kinds.text import normal, token_f1
from mlx_fd.problems.prompts import answer_prompt, final_prompt, revise_prompt
from mlx_fd.problems.sources import SOURCES, ProblemSource, register_source

ANIMALS = ("a cat", "a dog", "the bird", "A and B")


def choice(answer="B", choices=ANIMALS):
    return Problem("p", "Which barks?", "", answer, "choice", choices)


def text(answer, *also):
    return Problem("p", "Who?", "", answer, "text", (), also)


def math(answer, *also):
    return Problem("p", "What?", "", KINDS["math"].gold(answer, ()), "math", (), also)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("It barks.\n#### B", "B"),
        ("#### (b)", "B"),
        ("#### B. a dog", "B"),
        ("#### **B**", "B"),
        ("#### B) a dog, of course", "B"),
        ("#### a dog", "B"),
        (r"#### \text{a dog}", "B"),
        (r"#### $\text{A dog}$", "B"),
        (r"#### \boxed{\text{dog}}", "B"),
        (r"so $\boxed{\textbf{a dog}}$.", "B"),
        ("#### A dog.", "B"),
        ("#### The bird", "C"),
        ("#### A and B", "D"),
        ("#### The answer is C", "C"),
        (r"so \boxed{B}", "B"),
        (r"so \boxed{\text{C}}", "C"),
        (r"so $\boxed{\text{(D)}}$", "D"),
        ("The correct answer is B.", "B"),
        ("Answer: B", "B"),
        ("The answer is B, because option A is a cat.", "B"),
        ("I choose option B.", "B"),
        ("Option B barks. Option A does not.", None),  # both are spoken of, and none is said
        ("#### <B>", "B"),
        ("#### $B$", "B"),
        (r"so \boxed{\textbf{(B)}}", "B"),
        ("First I thought the answer is A. No, the answer is (C).", "C"),
        ("B", "B"),
        ("b.", "B"),
        ("#### E", None),
        ("#### 2", None),
        ("A dog barks, and a cat does not.", None),
        ("I think that a cat meows.", None),
        ("", None),
        ("#### ", None),
        ("#### \uff22", "B"),  # a wide B
        ("#### 'B'", "B"),
        ("#### (A) and (C)", None),
        ("#### A) or B)", None),
        ("#### A, C", None),
        ("The answer is A dog.", "B"),
        ("Answer: A dog", "B"),
        ("The answer is A because of the cat.", "A"),
        ("So the answer is the bird. It sings.", "C"),
        ("B is the correct answer.", "B"),
        ("(C) is the best choice", "C"),
        ("C is the wrong answer.", None),
        ("\u7b54\u6848\uff1aB", "B"),
        ("Die richtige Antwort ist B.", "B"),
        ("La réponse est : C", "C"),
        # a heading, and what is said below it
        ("#### Option B\nbarks.\n#### Option C\nsings.\n\nAnswer: B", "B"),
        ("#### C. the bird\nThis one sings.\n\n**Answer: B**", "B"),
        ("#### Option C\nsings.\n\nThe correct answer is B.", "B"),
        ("#### Option C\nsings.\n\n\\boxed{B}", "B"),
        ("#### Final answer:\n\nB", "B"),
        ("#### B\n\nOption C sings.", "B"),
        ("<think>C?</think><answer>B</answer>", "B"),
        ("<answer>The answer is (B).</answer>\nI chose between A and B.", "B"),
    ],
)
def test_a_choice_is_read_by_letter_or_in_its_words(reply, letter):
    problem = choice()
    assert read_final(reply, problem) == letter
    assert is_right(letter, problem) == (letter == "B")


VITAMINS = ("C", "A", "D", "K")
BLOOD = ("O", "A", "B", "AB")


@pytest.mark.parametrize(
    ("reply", "choices", "letter"),
    [
        ("#### A", VITAMINS, "A"),
        ("#### B", VITAMINS, "B"),
        (r"\boxed{A}", VITAMINS, "A"),
        ("The answer is A", VITAMINS, "A"),
        ("#### B. A", VITAMINS, "B"),
        ("#### K", VITAMINS, "D"),  # no letter of a choice, so it is the text
        ("#### B", BLOOD, "B"),
        ("#### B. A", BLOOD, "B"),
        ("#### AB", BLOOD, "D"),
    ],
)
def test_a_letter_by_itself_is_the_letter_whatever_the_choices_are(reply, choices, letter):
    assert read_final(reply, Problem("p", "?", "", letter, "choice", choices)) == letter


def test_choices_that_differ_in_a_mark_of_a_number_are_two():
    problem = Problem("p", "?", "", "B", "choice", ("15", "1.5"))
    assert read_final("#### 1.5", problem) == "B" and read_final("#### 15", problem) == "A"


def test_a_gold_that_is_a_letter_and_another_text_is_refused():
    with pytest.raises(ValueError, match="the letter B and the text of choice C; write its place"):
        KINDS["choice"].gold("B", BLOOD)
    assert KINDS["choice"].gold("AB", BLOOD) == "D"
    assert KINDS["choice"].gold("A", ("A", "B")) == "A"


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        (1, ("a", "b"), "B"),
        (1, ("1", "0", "2"), "B"),  # an integer is a place, from 0 on, as in MMLU
        ("1", ("1", "0", "2"), "A"),
        ("b", ("x", "y"), "B"),
        ("(A)", ("x", "y"), "A"),
        ("y", ("x", "y"), "B"),
        ("They agree.\n#### B", ("x", "y"), "B"),
        ("#### B\nThey agree.", ("x", "y"), "B"),
        ("#### Option A\nfails.\n#### Option B\nfits.\n\nAnswer: B", ("x", "y"), "B"),
        ("<think>A?</think><answer>B</answer>", ("x", "y"), "B"),
    ],
)
def test_gold_choices(answer, choices, letter):
    assert KINDS["choice"].gold(answer, choices) == letter


@pytest.mark.parametrize("answer", [2, -1, True, "C", "z", "", None])
def test_what_is_no_choice_is_refused(answer):
    with pytest.raises(ValueError, match="none of the 2 choices"):
        KINDS["choice"].gold(answer, ("x", "y"))


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("#### Paris", "paris", True),
        ("#### The Eiffel Tower.", "Eiffel tower", True),
        ("#### **Zoë Ñandú**", "zoë ñandú", True),
        ("#### London", "Paris", False),
        ("#### Paris, France", "Paris", False),
        ("Paris", "Paris", False),  # nothing is marked as the answer
        ("#### A", "A", True),  # a vitamin: what is an article alone stays
        ("#### B", "A", False),
        ("#### <Paris>", "Paris", True),  # the brackets of the prompt's <answer>
        ("#### The answer is Paris.", "Paris", True),
        ("#### Question and answer: a guide", "Question and Answer: A Guide", True),
        (r"#### $\text{Paris}$", "Paris", True),
        (r"so \boxed{\text{Paris}}", "Paris", True),
        (r"#### \boxed{\text{Paris}}", "Paris", True),
        (r"#### $\boxed{\mathit{Paris}}$", "Paris", True),
        ("<think>\n#### London\n</think>\n\n#### Paris", "Paris", True),
        (r"<think>\n\boxed{Paris}\n</think>\n\nWho knows?", "Paris", False),
        ("first #### London\nno: #### Paris\nBye.", "Paris", True),
        # in Markdown, under a heading, in tags, in a sentence of its own
        ("#### Step 1: think\nIt is in France.\n\n\\boxed{Paris}", "Paris", True),
        ("#### Step 1: think\nIt is in France.\n\nAnswer: Paris", "Paris", True),
        ("#### Final answer\n\n**Paris**\n\nIt is well known.", "Paris", True),
        ("#### Paris\n\nThe answer is well known.", "Paris", True),
        ("#### `Paris`", "Paris", True),
        ("**#### Paris**", "Paris", True),
        ("#### **Answer:** Paris", "Paris", True),
        ("<think>Rome?</think>\n<answer>\nParis\n</answer>", "Paris", True),
        ("<answer>Paris</answer>\nno: #### Rome", "Paris", False),
        ("It is in France.\n\n**Answer:** Paris", "Paris", True),
        ("It is in France.\nThe answer is Paris.", "Paris", True),
        ("Answer: Paris\nor maybe Rome", "Paris", False),
        ("so \\boxed{Paris}.\n\nQuestion: And Italy?\n\\boxed{Rome}", "Paris", True),
        # what makes it another number, or another name
        ("#### 125", "12,5", False),
        ("#### 12.5", "12,5", True),
        ("#### 330", "3:30", False),
        ("#### 3:30.", "3:30", True),
        ("#### 5", "-5", False),
        ("#### \u22125", "-5", True),
        ("#### 15", "1.5", False),
        ("#### .5", "0.5", True),
        ("#### 34", "3/4", False),
        ("#### \u00be", "3/4", True),
        ("#### 1012", "10-12", False),
        ("#### 10\u201312", "10-12", True),
        ("#### 25 million", "2.5 million", False),
        ("#### 1,234 people", "1234 people", True),
        ("#### 1.234.567", "1,234,567", True),
        ("#### 1.234,50", "1234.50", True),
        ("#### 1,00,000", "100000", True),
        ("#### C", "C#", False),
        ("#### **C#**.", "c#", True),
        ("#### C", "C++", False),
        ("#### B+", "A+", False),
        ("#### A", "A+", False),
        ("#### A-", "A", False),
        ("#### the U.S.A. (well-known)", "USA wellknown", True),
    ],
)
def test_texts_are_compared_as_squad_does(reply, gold, right):
    problem = text(gold)
    assert is_right(read_final(reply, problem), problem) is right


def test_several_references_are_right():
    problem = text("United States", "USA", "America")
    assert is_right(read_final("#### the U.S.A.", problem), problem)
    assert not is_right(read_final("#### Canada", problem), problem)


def test_token_f1_by_hand():
    # as published: of numbers, too, every mark is left out
    assert token_f1("12.5 m", "12,5 m") == 1
    # two of three words and two of two
    assert token_f1("the big red dog", "red dog") == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1("cat", "dog") == 0 and token_f1("", ".") == 1


@given(st.text(max_size=60))
def test_normal_texts_stay_as_they_are(some):
    assert normal(normal(some)) == normal(some)


# As MATH spaces it.
COLUMN = r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}"
SQUARE = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        (r"\boxed{\sqrt{51}}", r"\sqrt{51}", True),
        (r"\boxed{51}", r"\sqrt{51}", False),
        (r"#### $2\sqrt{3}$", r"\sqrt{12}", True),
        (r"\boxed{(2,4)}", "(2,4)", True),
        (r"\boxed{(4,2)}", "(2,4)", False),
        (r"\boxed{2.4}", "(2,4)", False),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
        (r"\boxed{[0,1)}", "[0,1)", True),
        (r"\boxed{[0,1]}", "[0,1)", False),
        (r"\boxed{\dfrac{\sqrt 3}{3}}", r"\frac{\sqrt{3}}{3}", True),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})", True),
        (r"#### 7\pi", r"7 \pi", True),
        (r"#### x = 5", "5", True),
        (r"#### 1 - i", "1-i", True),
        (r"\boxed{q-p}", "p-q", False),
        (r"#### \text{Evelyn}", r"\text{Evelyn}", True),
        ("It is 51.", "51", False),
        # without LaTeX
        ("#### 90\u00b0", r"90^\circ", True),
        ("#### x\u00b2 + 1", "x^2+1", True),
        ("#### x**2", "x^2", True),
        ("#### 2\u221a3", r"2\sqrt{3}", True),
        ("#### \u221a(x+1)", r"\sqrt{1+x}", True),
        ("#### (-\u221e,5]", r"(-\infty,5]", True),
        ("#### (-\u221e,5)", r"(-\infty,5]", False),
        ("#### pi/2", r"\frac{\pi}{2}", True),
        ("#### \u03c0r\u00b2", r"\pi r^2", True),
        (r"#### \varnothing", r"\emptyset", True),
        ("#### 1/6", r"0.1\overline{6}", True),
        ("#### 0.16", r"0.1\overline{6}", False),
        # units and bases
        ("#### 5 m", r"5\text{ cm}", False),
        ("#### 5 meters", r"5\text{ m}", True),
        ("#### 5", r"5\text{ cm}", True),
        ("#### 101", "101_2", False),
        ("#### 101_{2}", "101_2", True),
        ("#### 5_{10}", "5", True),
        # in Markdown, under a heading, in tags, in a sentence of its own
        ("#### **18**", "18", True),
        ("**#### 18**", "18", True),
        ("#### `18`", "18", True),
        ("#### _18_", "18", True),
        ('#### "18"', "18", True),
        ("#### Answer: 18", "18", True),
        ("#### **Answer:** $18$.", "18", True),
        (r"#### \[18\]", "18", True),
        (r"#### **\(18\)**.", "18", True),
        ("#### 18\u3002", "18", True),
        ("#### = 18", "18", True),
        ("#### \u2192 18", "18", True),
        ("#### **18** eggs", "18", True),
        ("#### **17**", "18", False),
        ("#### **(1,2)**", "(1,2)", True),
        ("**#### $(1,2)$**", "(1,2)", True),
        ("#### <(1,2)>", "(2,1)", False),
        ("#### <1,2>", "1,2", False),  # a vector
        ("#### **3/4**", r"\frac{3}{4}", True),
        (r"#### x = $2\sqrt{3}$", r"2\sqrt{3}", True),
        (
            "#### Step 1: Set up\n#### Step 2: Solve\n\nIt is $\\boxed{2\\sqrt{3}}$.",
            r"2\sqrt{3}",
            True,
        ),
        ("#### Answer:\n$$2\\sqrt{3}$$", r"2\sqrt{3}", True),
        ("#### z*", "z", False),
        (r"<think>\boxed{7}</think><answer>2\sqrt{3}</answer>", r"\sqrt{12}", True),
        ("It follows.\nThe final answer is: $2\\sqrt{3}$.", r"\sqrt{12}", True),
        # matrices keep their rows
        (rf"\boxed{{{COLUMN}}}", COLUMN, True),
        (rf"\boxed{{{COLUMN.replace(' ', '')}}}", COLUMN, True),
        (rf"\boxed{{{COLUMN.replace('pmatrix', 'bmatrix')}}}", COLUMN, True),
        (rf"\boxed{{{COLUMN.replace('5', '6')}}}", COLUMN, False),
        (r"\boxed{\begin{pmatrix} -7 & 16 & 5 \end{pmatrix}}", COLUMN, False),
        (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", SQUARE, True),
        (r"\boxed{\begin{bmatrix}1&3\\2&4\end{bmatrix}}", SQUARE, False),
        (r"\boxed{\begin{vmatrix}1&2\\3&4\end{vmatrix}}", SQUARE, False),
        # numbers as people write them
        ("#### 3.5", "3 1/2", True),
        ("#### 31/2", "3 1/2", False),
        (r"#### 3\frac{1}{2}", "3 1/2", True),
        ("#### 0.5", "\u00bd", True),
        ("#### \u00bd", r"\frac{1}{2}", True),
        ("#### 23", "2 3", False),
        ("#### 2, 3", "23", False),
        ("#### 1500", "1.5e3", True),
        ("#### 0.00005", 0.00005, True),
        ("#### 0.00006", 0.00005, False),
        (r"#### 5 \times 10^{-5}", 0.00005, True),
        ("#### 0.0000004", "0.0000005", False),
        ("#### 1,234", r"1\,234", True),
        ("#### 1 234", "1234", True),
        ("#### 50", r"50\%", True),
        ("#### 0.5", r"50\%", True),
        ("#### 3 dollars", r"3\text{ cents}", False),
        # two numbers, in either order
        ("#### 5,12", "12,5", True),
        ("#### 12.5", "12,5", False),
    ],
)
def test_formulas_are_compared_by_meaning(reply, gold, right):
    problem = math(gold)
    assert is_right(read_final(reply, problem), problem) is right


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("3 1/2", "7/2"),
        ("2 3", "2 3"),
        ("12,5", "12,5"),
        ("1,234", "1234"),
        (0.00005, "1/20000"),
        (r"\dfrac{3}{4}", r"\frac{3}{4}"),
        (COLUMN, r"\begin{pmatrix}-7\\16\\5\end{pmatrix}"),
        ("#### Step 1: Isolate\nx = 4 - 1\n#### Step 2: Solve\nso $\\boxed{2k}$.", "2k"),
        ("So \\boxed{2k}.\n#### Check\nIt holds.", "2k"),
        ("3+5=8\nAnswer: 8", "8"),
        ("3+5=8\n#### $2k$\n\nDone.", "2k"),
        ("#### Final answer\n$2k$", "2k"),
        ("<think>3*4</think><answer>2k</answer>", "2k"),
    ],
)
def test_gold_formulas(answer, gold):
    assert KINDS["math"].gold(answer, ()) == gold


@pytest.mark.parametrize(
    "answer",
    [
        "She has 3 + 5 = 8 apples.",
        "So 3*4 = 12 eggs",
        "#### Conclusion\nx is 2k",
        "Let x = 2k.\nThen y = 3k.",
    ],
)
def test_a_gold_that_is_a_solution_is_no_formula(answer):
    with pytest.raises(ValueError, match="does not say what it comes to"):
        KINDS["math"].gold(answer, ())


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("He asks.\nThe answer is Paris.", "Paris."),
        ("Answer: Paris", "Paris"),
        ("#### Conclusion\nAnswer: Paris", "Paris"),
        ("#### Final answer\nParis", "Paris"),
        ("#### Step 1\nIt is \\boxed{Paris}.", "Paris"),
        ("<answer> Paris </answer>", "Paris"),
        ("Paris\n(France)", "Paris\n(France)"),
    ],
)
def test_gold_texts(answer, gold):
    assert KINDS["text"].gold(answer, ()) == gold


def test_a_heading_is_no_gold_text():
    with pytest.raises(ValueError, match="more below, as a heading has"):
        KINDS["text"].gold("#### Conclusion\nIt is Paris.", ())


def test_a_tower_of_powers_is_wrong_soon_and_the_next_answer_is_compared(monkeypatch):
    monkeypatch.setattr(math_worker, "_SECONDS", 2.0)  # instead of 5
    monkeypatch.setattr(math_worker, "_worker", math_worker._Worker())
    assert not is_right("9^{9^{9^{9^9}}}", math("5"))
    assert is_right(r"\sqrt{25}", math("5"))


def test_a_process_that_gets_no_processor_for_a_while_grades_all_the_same(monkeypatch):
    monkeypatch.setattr(math_worker, "_SECONDS", 1.0)
    monkeypatch.setattr(math_worker, "_worker", worker := math_worker._Worker())
    math_worker.same.cache_clear()
    assert is_right(r"\sqrt{25}", math("5"))
    os.kill(worker._process.pid, signal.SIGSTOP)
    threading.Timer(2, os.kill, (worker._process.pid, signal.SIGCONT)).start()
    assert is_right(r"\sqrt{12}", math(r"2\sqrt{3}"))
    worker.end()


@given(st.text(max_size=80))
def test_no_reply_is_too_odd_to_be_read(some):
    for problem in (choice(), text("a"), math("1"), Problem("p", "?", "", "1")):
        for reply in (some, f"#### {some}", rf"\boxed{{{some}}}"):
            final = read_final(reply, problem)
            assert final is None or final == final.strip() != ""


def test_each_kind_asks_for_its_own_ending():
    for name, kind in KINDS.items():
        problem = Problem("p", "?", "", "", name)
        asked = {"none": "", "code": "Write the whole solution in one block of ```python"}
        assert kind.form.end.startswith(asked.get(name, "End with a line of its own: #### <"))
        for prompt in (
            answer_prompt("Why?", form_of(problem)),
            revise_prompt("", form_of(problem)),
            final_prompt(form_of(problem)),
        ):
            assert prompt.endswith(kind.form.end)
    assert answer_prompt(" 2 + 3? ") == (
        "2 + 3?\n\nSolve step by step. End with a line of its own: #### <number>"
    )


def test_without_gold_nothing_is_right_and_nothing_wrong():
    problem = Problem("p", "Tell a joke.", "", "", "none")
    final = read_final("Why?\n#### 3", problem)
    assert final is None
    assert is_right(final, problem) is None
    assert answer_prompt(problem.question, form_of(problem)) == "Tell a joke."
    assert not are_graded([problem])
    assert known([None, True, None, False]) == [True, False]


def test_a_source_has_gold_for_all_its_problems_or_for_none():
    mixed = ProblemSet("mixed", "x", (choice(), Problem("q", "?", "", "", "none")), "")
    register_source(ProblemSource(name="mixed", help="both", load=lambda split: mixed))
    try:
        with pytest.raises(UserError, match="some of its problems have right answers"):
            load("mixed", "x")
    finally:
        SOURCES.unregister("mixed")


def test_final_answers_are_compared_where_two_different_ones_cannot_both_be_right():
    assert same_final("B", "B", choice()) is True
    assert same_final("B", "C", choice()) is False
    assert same_final(None, "B", choice()) is None and same_final("B", None, choice()) is None
    assert same_final("Bach", "J. S. Bach", text("Bach")) is None
    # One value in two forms is no contradiction; two values are.
    half = Problem("p", "?", "", "0.5", "math")
    assert same_final("\\frac{1}{2}", "0.5", half) is True
    assert same_final("\\frac{1}{3}", "0.5", half) is False


def test_a_comparison_that_cannot_begin_is_no_difference(monkeypatch):
    """All formulas were called different, and a run went on with that."""
    monkeypatch.setattr(math_worker, "_worker", math_worker._Worker())
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    math_worker.same.cache_clear()
    with pytest.raises(UserError, match="no formulas can be compared"):
        is_right("x+1", Problem("p", "?", "", "1+x", "math"))


def test_answers_that_are_alike_vote_together():
    root = Problem("p", "?", "", "2\\sqrt{3}", "math")
    finals = ["\\sqrt{12}", "7", None, "2\\sqrt{3}", "7.0", "\\sqrt{12}"]
    assert votes(finals, root) == [finals[0], "7", None, finals[0], "7", finals[0]]
    assert votes(["1", "2", None, "1"], Problem("p", "?", "", "1")) == ["1", "2", None, "1"]
    assert {name for name, kind in KINDS.items() if not kind.exclusive} == {"text", "code", "none"}
