"""The generator is held to its own questions: an independent reader solves and judges them."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.problems import arithmetic, parsing, prompts, sources
from mlx_fd.problems.arithmetic import (
    ALL_RIGHT,
    EXTRA,
    FINAL,
    KINDS,
    MISSED,
    OPERATION,
    QUANTITY,
    SLIP,
    Verdict,
    amateur_feedback,
    exercise,
    exercises,
    feedback,
    feedback_text,
    first_error,
    judge,
    wrong_answer,
)

SOLUTION = "Step 1: <<3*4=12>>12\nStep 2: <<5+12=17>>17\nStep 3: <<17-8=9>>9\n#### 9"
seeds = st.integers(0, 2**32)


def drawn_from(seed, **options):
    return exercise(random.Random(seed), **options)


def solve(question):
    """Read a story as a person does, word by word; nothing of the generator is used."""
    who = re.search(r"does (\w+) have|", question)[1]
    *sentences, ask = re.findall(r"[^.?]+", question)
    thing = re.search(r"How many (\w+)", ask)[1]
    value = None
    for sentence in sentences:
        words = sentence.split()
        numbers = [int(w) for w in words if w.isdigit()]
        if "years" in words:
            continue
        if "doubles" in words or "triples" in words:
            value *= 2 if "doubles" in words else 3
        elif "each" in words:
            value += numbers[0] * numbers[1]
        elif {"loses", "sells"} & set(words):
            value -= numbers[0]
        elif "gives" in words:
            giver = words[0]
            value += -numbers[0] if giver == who else numbers[0]
        elif {"buys", "finds"} & set(words):
            value += numbers[0]
        elif value is None:
            value, who = numbers[0], who or next(w for w in words if w in arithmetic.NAMES)
        else:
            assert thing not in words, sentence
    return value


@given(seeds, st.sampled_from([None, 1, 2, 3, 4, 5, 6]), st.booleans())
def test_solutions_are_right(seed, steps, transfer):
    drawn = drawn_from(seed, steps=steps, transfer=transfer)
    assert parsing.final_answer(drawn.solution) == solve(drawn.question)
    marks = re.findall(r"<<(.+?)=(\d+)>>(\d+)\n", drawn.solution)
    assert len(marks) == len(drawn.steps) == (steps or len(drawn.steps))
    for calculation, result, copy in marks:
        left, op, right = re.fullmatch(r"(\d+)([-+*])(\d+)", calculation).groups()
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[op](int(left), int(right))
        assert value == int(result) == int(copy)
        assert 1 <= value <= 99
    assert drawn.solution.endswith(f"\n#### {marks[-1][1]}")


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-hard"])
def test_splits_are_fixed_and_apart(name):
    loaded = {split: problems.load(name, split) for split in arithmetic.SPLITS}
    sizes = {split: len(found.problems) for split, found in loaded.items()}
    assert sizes == {"train": 4000, "validation": 500, "test": 500, "transfer": 500}
    questions = [p.question for found in loaded.values() for p in found.problems]
    assert len(set(questions)) == len(questions)
    for split, found in loaded.items():
        assert [p.id for p in found.problems[:2]] == [
            f"{name}-{split}-00000",
            f"{name}-{split}-00001",
        ]
        assert all(p.answer == str(solve(p.question)) for p in found.problems)
        assert all(p.answer == str(Fraction(p.answer)) for p in found.problems)
    # Whatever the seed, a question belongs to one split.
    for split in arithmetic.SPLITS[:3]:
        stream = exercises(split, 7, steps=(3, 4) if name == "arithmetic-hard" else ())
        assert {arithmetic.split_of(next(stream).question) for _ in range(200)} == {split}


def test_hard_problems_are_longer_and_each_belongs_to_one_source():
    lengths = {
        name: {len(arithmetic.read(p.solution)[0]) for p in problems.load(name, "test").problems}
        for name in ("arithmetic", "arithmetic-hard")
    }
    assert lengths == {"arithmetic": {1, 2, 3, 4}, "arithmetic-hard": {3, 4}}
    for name in lengths:
        truth = sources.truth_of(name)
        asked = truth.questions(6, 3, "test")
        assert len({question.problem.question for question in asked}) == 6
        for question in asked:
            assert sources.truth_about(question.problem) is truth
            assert truth.judge(question.problem, question.answer).score == question.score
            assert (question.first_error > 0) == (question.answer != question.problem.solution)


def test_the_same_in_another_process():
    program = "from mlx_fd import problems; print(problems.load('arithmetic', 'test').sha256)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] == problems.load("arithmetic", "test").sha256 + "\n"


def test_transfer_is_new_in_numbers_and_sentences():
    def shape(sentence):
        sentence = re.sub(r"\d+", "9", sentence)
        for names, mark in ((arithmetic.NAMES, "N"), (arithmetic.THINGS, "things")):
            sentence = re.sub(r"\b(?:" + "|".join(names) + r")\b", mark, sentence)
        return sentence

    shapes, starts, words = {}, {}, {}
    for split in ("train", "transfer"):
        rows = problems.load("arithmetic", split).problems
        sentences = [[s.strip() for s in re.findall(r"[^.?]+", p.question)] for p in rows]
        shapes[split] = {shape(s) for row in sentences for s in row}
        starts[split] = {int(re.search(r"\d+", row[0])[0]) for row in sentences}
        words[split] = {w for p in rows for w in re.findall(r"[A-Za-z]+", p.question)}
    assert not starts["train"] & starts["transfer"]
    assert not shapes["train"] & shapes["transfer"]
    # New sentences out of known words: what is tested is transfer, not unknown words.
    assert {w.lower() for w in words["transfer"]} <= {w.lower() for w in words["train"]}


def test_unknown_split():
    with pytest.raises(UserError, match="did you mean 'validation'"):
        problems.load("arithmetic", "validatoin")
    with pytest.raises(UserError, match=r"did you mean 'arithmetic'"):
        problems.load("arithmetics")


@pytest.mark.parametrize(
    ("answer", "error", "kind"),
    [
        (SOLUTION, 0, ""),
        (SOLUTION.replace("3*4", "4*3").replace("5+12", "12+5"), 0, ""),
        (SOLUTION.replace("12>>12", "13>>13", 1), 1, SLIP),
        (SOLUTION.replace("17-8=9>>9", "17-8=8>>8").replace("#### 9", "#### 8"), 3, SLIP),
        (SOLUTION.replace("17-8=9>>9", "17+8=25>>25"), 3, OPERATION),
        (SOLUTION.replace("17-8=9>>9", "8-17=9>>9"), 3, OPERATION),
        (SOLUTION.replace("17-8=9>>9", "17-5=12>>12"), 3, QUANTITY),
        (SOLUTION.replace("5+12=17", "5-8=9"), 2, MISSED),
        ("Step 1: <<3*4=12>>12\n#### 12", 2, MISSED),
        ("I do not know.", 1, MISSED),
        (SOLUTION.replace("\n####", "\nStep 4: <<9+5=14>>14\n####"), 4, EXTRA),
        (SOLUTION.replace("#### 9", "#### 8"), 4, FINAL),
        (SOLUTION.replace("\n#### 9", ""), 4, FINAL),
        # Nothing after the first error counts.
        (SOLUTION.replace("12>>12", "13>>13", 1).replace("17-8=9", "17+8=25"), 1, SLIP),
    ],
)
def test_judge(answer, error, kind):
    verdict = judge(SOLUTION, answer)
    assert verdict == Verdict(error, kind)
    assert first_error(feedback_text(SOLUTION, answer)) == error


def test_scores():
    assert [Verdict(k, "x").score for k in range(1, 8)] == [-1, -0.8, -0.6, -0.4, -0.2, -0.2, -0.2]
    assert Verdict(0, "").score == 1


def test_feedback_as_it_reads():
    assert feedback_text(SOLUTION, SOLUTION.replace("17-8=9>>9", "17+8=25>>25")) == (
        "Step 1 should be 3*4=12, it is 3*4=12: right. "
        "Step 2 should be 5+12=17, it is 5+12=17: right. "
        "Step 3 should be 17-8=9, it is 17+8=25: the wrong operation."
    )
    assert feedback_text(SOLUTION, SOLUTION).endswith(
        "Step 3 should be 17-8=9, it is 17-8=9: right. "
        "The final answer should be 9, it is 9: right. Every step is right."
    )
    assert feedback_text(SOLUTION, "Step 1: <<3*4=12>>12\n#### 12").endswith(
        "Step 2 should be 5+12=17, it is missing."
    )
    wrong_end = feedback_text(SOLUTION, SOLUTION.replace("#### 9", "#### 8"))
    assert wrong_end.endswith("The final answer should be 9, it is 8: the wrong final answer.")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (ALL_RIGHT, 0),
        ("", None),
        ("The answer looks good to me.", None),
        ("Step 1 should be 3*4=12, it is 3*4=12: right.", None),
        ("Step 2 should be", None),
        ("Step 2 should be 3+4=7, it is 3+4=8:", None),
        ("The final answer should be 9, it is 8: the wrong final answer.", 1),
        ("Step 1 should be 1+1=2, it is 1+1=3: a slip. " + ALL_RIGHT, 1),
        ("Step 5 should not be there.", 5),
    ],
)
def test_first_error_of_other_texts(text, error):
    assert first_error(text) == error


@given(seeds, st.sampled_from(KINDS), st.booleans())
def test_wrong_answers(seed, kind, transfer):
    drawn = drawn_from(seed, transfer=transfer)
    rng = random.Random(seed)
    text = wrong_answer(rng, drawn, kind)
    verdict = judge(drawn.solution, text)
    assert verdict.first_error >= 1
    assert verdict.kind in (kind, SLIP)
    marks = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", text)
    gold = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)", drawn.solution)
    # Right up to the first error, and no second slip after it.
    before = verdict.first_error - 1
    assert marks[:before] == gold[:before]
    slips = [eval_step(m) != int(m[3]) for m in marks]
    assert sum(slips) == (verdict.kind == SLIP)
    assert all(m[3] == m[4] and 1 <= int(m[3]) <= 99 for m in marks)
    if verdict.kind != FINAL:
        assert text.endswith(f"#### {marks[-1][3]}")
    said = feedback(drawn.solution, text)
    assert first_error(said.text) == verdict.first_error
    assert said.written_score == verdict.score < 0


def eval_step(mark):
    left, op, right = int(mark[0]), mark[1], int(mark[2])
    return left + right if op == "+" else left - right if op == "-" else left * right


def test_errors_are_of_every_kind_and_place():
    stream, rng = exercises("train", 3), random.Random(3)
    seen = Counter()
    for _ in range(2000):
        drawn = next(stream)
        verdict = judge(drawn.solution, wrong_answer(rng, drawn))
        seen[verdict.kind] += 1
        seen[verdict.first_error] += 1
    assert all(seen[kind] > 150 for kind in KINDS if kind != FINAL)
    assert seen[FINAL] > 50
    assert all(seen[place] > 100 for place in range(1, 5))
    assert seen[5] > 20


@given(seeds, st.booleans())
def test_feedback_goes_through_the_parser(seed, right):
    drawn = drawn_from(seed)
    rng = random.Random(seed)
    answer = drawn.solution if right else wrong_answer(rng, drawn)
    said = feedback(drawn.solution, answer)
    assert parsing.parse_feedback(prompts.format_feedback(said)) == said
    amateur = amateur_feedback(rng, drawn, answer)
    parsed = parsing.parse_feedback(prompts.format_feedback(prompts.Feedback(amateur, 0.5)))
    assert (parsed.text, parsed.written_score) == (amateur, 0.5)


def test_amateurs_are_often_wrong():
    stream, rng = exercises("train", 4), random.Random(4)
    hits = 0
    for _ in range(500):
        drawn = next(stream)
        answer = wrong_answer(rng, drawn)
        said = first_error(amateur_feedback(rng, drawn, answer))
        hits += said == judge(drawn.solution, answer).first_error
    assert 150 < hits < 400


def test_rows_round_trip_through_a_file(tmp_path):
    rows = problems.load("arithmetic", "test").problems[:20]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": p.question, "answer": p.solution}) for p in rows]
    path.write_text("\n".join(lines))
    assert [p.answer for p in problems.load(str(path)).problems] == [p.answer for p in rows]
