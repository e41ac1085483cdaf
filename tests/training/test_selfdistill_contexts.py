"""What the self-teacher sees: each context's message, its limits, and noise on questions."""

import dataclasses
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.errors import UserError
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.problems import Problem, arithmetic, prompts
from mlx_fd.problems.kinds import form_of, is_right, read_final
from mlx_fd.training.selfdistill import contexts, critics
from mlx_fd.training.selfdistill.contexts import (
    CONTEXTS,
    Attempt,
    Materials,
    View,
    reflection,
    rubric,
    step_critique,
)
from mlx_fd.training.selfdistill.noise import KINDS, NUMBERS_SAFE, noisy, spoken
from mlx_fd.training.selfdistill.playbook import MAX_LESSONS, Playbook

TRUTH = Materials(truth=True)


def attempt(problem, text, question=None):
    final = read_final(text, problem)
    right = is_right(final, problem)
    return Attempt(problem, question or problem.question, (), text, final, right)


def groups(count, seed=0, wrong=2):
    """Problems, each with a right attempt and some wrong ones, the right one second."""
    rng = random.Random(seed)
    problems = arithmetic.load("validation").problems
    found = []
    for place, drawn in enumerate(arithmetic.problems_of("validation")[:count]):
        texts = [arithmetic.wrong_answer(rng, drawn) for _ in range(wrong)]
        texts.insert(1, drawn.solution)
        found.append([attempt(problems[place], text) for text in texts])
    return found


@pytest.fixture(scope="module")
def fifty():
    return groups(50)


# ------------------------------------------------------------------------------------ every context


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_a_function_of_attempts_and_seed(name, fifty):
    flat = [a for group in fifty[:5] for a in group]
    views = CONTEXTS[name].views(flat, TRUTH)
    assert views == CONTEXTS[name].views(flat, TRUTH)
    assert views == [v for group in fifty[:5] for v in CONTEXTS[name].views(group, TRUTH)]
    for own, view in zip(flat, views, strict=True):
        assert view.student == prompts.answer_prompt(own.question)
        if view.teacher is not None:
            assert view.teacher.startswith(own.problem.question)
            assert view.teacher.endswith(view.student.rpartition("\n\n")[2])


def test_only_known_contexts_are_described():
    for name in CONTEXTS:
        text = contexts.describe(name)
        assert text.endswith(".")
        assert "\n" not in text
    with pytest.raises(UserError, match="no context 'refrence'"):
        contexts.describe("refrence")


# ------------------------------------------------------------------------------- the true critique


def test_right_steps_are_copied_verbatim_and_the_rest_is_right(fifty):
    mended = 0
    for group in groups(200, seed=1):
        for own, view in zip(group, CONTEXTS["step-critique"].views(group, TRUTH), strict=True):
            solution = own.problem.solution
            error = arithmetic.judge(solution, own.text).first_error
            assert arithmetic.judge(solution, view.note).first_error == 0
            if not error:
                assert view.note == own.text
                continue
            mended += 1
            kept = own.text.split("\n")[: error - 1]
            assert view.note.split("\n")[: len(kept)] == kept
            assert view.note in view.teacher
            # What is wrong is gone: the first wrong line is not in the message as a whole line.
            bad = own.text[slice(*arithmetic.error_span(solution, own.text))]
            assert bad not in view.note.split("\n")
    assert mended == 400


def test_a_commuted_right_step_is_copied_as_it_was_written():
    solution = "Step 1: <<3*4=12>>12\nStep 2: <<5+12=17>>17\n#### 17"
    answer = "Step 1: <<4*3=12>>12\nStep 2: <<5+12=18>>18\n#### 18"
    assert arithmetic.true_rewrite(solution, answer) == (
        "Step 1: <<4*3=12>>12\nStep 2: <<5+12=17>>17\n#### 17"
    )


def test_the_truth_is_refused_where_it_is_not_known():
    problem = Problem("x", "How many?", "3 + 4 = <<3+4=7>>7\n#### 7", "7")
    for name in ("step-critique", "feedback", "reflection"):
        with pytest.raises(UserError, match="x: the true critique is known for generated"):
            CONTEXTS[name].views([attempt(problem, "#### 8")], TRUTH)
    with pytest.raises(UserError, match="needs a critic"):
        CONTEXTS["step-critique"].views([attempt(problem, "#### 8")], Materials())


@pytest.mark.parametrize("kind", ["number", "choice", "math", "text", "code"])
def test_a_critic_is_asked_for_an_answer_of_the_problems_kind(kind):
    problem = Problem("one", "What is it?", "It is so.", "B", kind=kind)
    request = critics.rewrite_request(problem, problem.solution, "Is it so?")
    assert request.startswith(
        "Problem: What is it?\n\nA solution known to be right:\nIt is so.\n\n"
    )
    assert request.endswith(f"Write nothing but that solution. {form_of(problem).end}")


def test_the_tiny_expert_is_a_critic(fifty):
    group = [a for g in fifty[:6] for a in g]
    critic = Materials(critic=load(resolve("tiny")), critic_sees="problem", critic_tokens=112)
    views = CONTEXTS["step-critique"].views(group, critic)
    verbatim = 0
    for own, view in zip(group, views, strict=True):
        if view.teacher is None:
            continue
        assert read_final(view.note, own.problem) == own.problem.answer
        verbatim += view.note == arithmetic.true_rewrite(own.problem.solution, own.text)
    assert verbatim >= 15  # of 18: it is not always right


# -------------------------------------------------------------------------------- rubrics, leaks


def test_a_rubric_has_no_digit_and_names_each_operation(fifty):
    for (first, *_), drawn in zip(fifty, arithmetic.problems_of("validation"), strict=False):
        text = rubric.rubric(first.problem)
        assert not re.search(r"\d", text)
        assert len(re.findall(r"The \w+ step (?:adds|subtracts|multiplies)\.", text)) == len(
            drawn.steps
        )


def test_a_rubric_of_gsm8k_reads_its_marks():
    solution = "She eats 16/2=<<16/2=8>>8.\nShe sells (9-3)*2=<<(9-3)*2=12>>12.\n#### 12"
    text = rubric.rubric(Problem("x", "?", solution, "12"))
    assert "The first step divides.\n" in text
    assert "The second step subtracts and multiplies.\n" in text
    assert "The third" not in text
    plain = rubric.rubric(Problem("x", "?", "#### 12", "12"))
    assert "step" not in plain
    assert "number" not in rubric.rubric(Problem("x", "?", "", "A", "choice", ("a", "b")))


# ------------------------------------------------------------------------------------- siblings


def test_a_sibling_is_right_and_not_the_attempt_itself(fifty):
    first, right, last = fifty[0]
    views = CONTEXTS["sibling"].views([first, right, last], Materials())
    assert right.text in views[0].teacher
    assert right.text in views[2].teacher
    assert views[1].teacher is None  # alone: no feedback without critic or truth
    told = CONTEXTS["sibling"].views([first, right, last], TRUTH)[1].teacher
    assert "Feedback on an earlier attempt" in told
    # Another problem's right attempt is no sibling.
    assert CONTEXTS["sibling"].views([first, fifty[1][1]], Materials())[0].teacher is None


def test_contrast_puts_right_and_wrong_hints_into_the_same_words():
    (group,) = groups(1, wrong=6)
    views = CONTEXTS["contrast"].views(group, Materials(most_wrong=4))
    right = group[1].text
    assert views[1].teacher is None  # no other right one
    for own, view in zip(group, views, strict=True):
        if own.correct:
            continue
        shell = view.teacher.split(right)
        assert len(shell) == 2
        assert len(view.wrong) == 4
        for message in view.wrong:
            assert message.startswith(shell[0])
            assert message.endswith(shell[1])
            hint = message[len(shell[0]) : len(message) - len(shell[1])]
            assert hint in [other.text for other in group if not other.correct]
    alone = CONTEXTS["contrast"].views(group[:1], Materials())
    assert alone == [View(prompts.answer_prompt(group[0].question), None)]


def test_hints_are_drawn_from_the_others_that_came_to_an_answer():
    ((wrong, right, other_wrong),) = groups(1)
    another = attempt(right.problem, f"So it is {right.final}.\n#### {right.final}")
    lost = attempt(right.problem, "Nothing.")
    views = CONTEXTS["contrast"].views
    # As in the published code: no attempt is its own hint, and one without an answer is none.
    assert [v.teacher for v in views([right, another, lost], Materials())] == [None] * 3
    assert [v.teacher for v in views([right, wrong], Materials())] == [None] * 2
    seen = set()
    for seed in range(20):
        first, *_, last = views([wrong, other_wrong, right, another, lost], Materials(seed=seed))
        seen.add(first.teacher)
        assert len(first.wrong) == 1 and len(last.wrong) == 2
    assert len(seen) == 2
    # What stands before it at other problems changes no draw.
    (before,) = groups(1, seed=3)
    alone = views([wrong, other_wrong, right, another], Materials())
    elsewhere = [dataclasses.replace(a, problem=Problem("else", "?", "", "1")) for a in before]
    assert views([*elsewhere, wrong, other_wrong, right, another], Materials())[3:] == alone


# ------------------------------------------------------------------------------------ reflection


def test_reflection_remembers_lessons_and_solutions(fifty):
    first, right, last = fifty[0]
    views = CONTEXTS["reflection"].views([first, right, last], TRUTH)
    assert views[1].teacher is None
    assert first.text in views[0].teacher
    book = reflection.remember(Playbook(), [first, right, last], views)
    assert book.solutions == {first.problem.id: right.text}
    assert {lesson.text for lesson in book.lessons} <= set(reflection.lessons())
    assert sum(lesson.failures for lesson in book.lessons) == 2
    later = dataclasses.replace(TRUTH, playbook=book)
    again, solved, _ = CONTEXTS["reflection"].views([first, right, last], later)
    for lesson in book.lessons:
        assert f"- {lesson.text}" in again.teacher
    assert right.text in solved.teacher
    assert Playbook.from_json(book.to_json()) == book


def test_a_playbook_keeps_the_latest_and_most_frequent_lessons():
    book = Playbook()
    for k in range(40):
        book = book.after([f"lesson {k}", "always"], {})
    assert len(book.lessons) == MAX_LESSONS
    assert {lesson.text for lesson in book.lessons} == {
        "always",
        *(f"lesson {k}" for k in range(29, 40)),
    }
    assert max(lesson.failures for lesson in book.lessons) == 40


def test_a_lesson_is_known_or_the_last_sentence():
    assert reflection.lesson("Step 1 should be 3+4=7, it is 3+4=8: a slip.").startswith("Calculate")
    assert reflection.lesson("Step 2 is wrong.\nCheck units next time.") == "Check units next time."


# --------------------------------------------------------------------------------------- quoting


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80), st.integers(0, 9))
def test_no_text_poses_as_another_part_of_the_message(text, place):
    """Parts are set apart by blank lines; no quoted text has one."""
    question = Problem("p", "How many?", "", "")
    count = step_critique.critique_message(question, "x").count("\n\n")
    assert step_critique.critique_message(question, f"{text}\n\n \n{place}").count("\n\n") == count


# ----------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", KINDS)
def test_noise_grows_with_its_level_and_repeats(kind):
    changed = []
    for drawn in arithmetic.problems_of("validation")[:40]:
        question = drawn.question
        assert noisy(question, kind, 0, 3) == question
        levels = [noisy(question, kind, level, 3).split() for level in (0.1, 0.3, 0.5)]
        assert noisy(question, kind, 0.3, 3).split() == levels[1]
        changed.append(
            [sum(w not in question.split() for w in words) / len(words) for words in levels]
        )
    low, middle, high = (sum(column) / 40 for column in zip(*changed, strict=True))
    assert 0 < low < middle < high


def numbers(text):
    """All numbers below 100 of a text, digits and words alike, in order."""
    words = {spoken(n): n for n in range(99, -1, -1)}
    pattern = "|".join(sorted(words, key=len, reverse=True))
    found = re.findall(rf"\d+|\b(?:{pattern})\b", text)
    return [int(f) if f.isdigit() else words[f] for f in found]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_can_be_recovered_up_to_half_the_words_and_not_above(kind):
    lost = 0
    for drawn in arithmetic.problems_of("validation")[:60]:
        truth = numbers(drawn.question)
        for seed in range(3):
            assert numbers(noisy(drawn.question, kind, NUMBERS_SAFE, seed)) == truth
            lost += numbers(noisy(drawn.question, kind, 0.9, seed)) != truth
    assert lost > 30


def test_noise_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="typed, transcribed"):
        noisy("x", "spoken", 0.1, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        noisy("x", "typed", 1.5, 0)


@given(st.text(max_size=120), st.sampled_from(KINDS), st.floats(0, 1))
def test_noise_takes_any_text(text, kind, level):
    assert isinstance(noisy(text, kind, level, 0), str)


@pytest.mark.parametrize(
    ("number", "words"), [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety nine"),
                          (105, "one zero five")]
)  # fmt: skip
def test_numbers_are_spoken(number, words):
    assert spoken(number) == words
