"""Nothing that reads a text takes longer than in proportion to its length."""

import random
import re

import numpy as np
import pytest

import mlx_fd
from mlx_fd.evaluation import processbench
from mlx_fd.losses.answer import answer_span
from mlx_fd.losses.reasoning import step_weights
from mlx_fd.problems import arithmetic, parsing, prompts
from mlx_fd.problems.kinds.math import written
from mlx_fd.problems.kinds.text import compared
from mlx_fd.problems.parsing import feedbacks
from mlx_fd.training.selfdistill import noise
from mlx_fd.training.selfdistill.contexts import reflection
from support import patterns
from support.draws import by_day, draws

PATTERNS = patterns.compiled(mlx_fd)
USES = patterns.uses(mlx_fd)


def test_no_pattern_hides_in_a_function():
    """What is compiled where it is used is found by nobody, the tests below included."""
    assert patterns.hidden(mlx_fd) == []
    assert len(PATTERNS) > 80
    names = {name.rpartition(".")[2].partition("[")[0] for name in PATTERNS}
    assert {"_FRACTION", "_AFTER_LABEL", "_LATEX", "_RENAMED", "_OPTION"} <= names


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_linear(name):
    pattern = PATTERNS[name]
    short = name.rpartition(".")[2].partition("[")[0]
    # What is handed on, or in a tuple, may be used in any way.
    methods = USES.get(short, set()) & patterns.METHODS or patterns.METHODS
    for how, run in patterns.runs_of(pattern, methods).items():
        for make in patterns.attacks(pattern):
            length = patterns.outgrown(run, make)
            assert length is None, f"{name}.{how} on {length} characters like {make(40)!r}"


@pytest.mark.parametrize(
    ("bad", "method"),
    [
        (r"(a+)+b", "match"),
        (r"-?[0-9]{1,120}(?:/[0-9]*[1-9][0-9]*)?", "fullmatch"),  # a bundle's numbers, once
        (r"(?:to|and)\s*\d*[.,]?\d+\s*[,;]", "match"),
        (r"\s+x", "search"),
        (r"<b>[^<]*\d[^<]*\d[^<]*</b>", "match"),
        (r"(?:x|xy?)*z", "match"),
    ],
)
def test_a_pattern_that_is_not_linear_is_found(bad, method):
    pattern = re.compile(bad)
    [run] = patterns.runs_of(pattern, {method}).values()
    assert any(patterns.outgrown(run, make) for make in patterns.attacks(pattern))


# -------------------------------------------------------------------------------------- functions

UNITS = [
    "Score:", "Score: ", "Score", "Score: 1 ", "Score: 1/", "Score: 1\n", "score:1,", "score: `",
    "score:0.1,0.1", "score is ", "score (", "Score 1 on a scale of ", "Score: excellent 1 to ",
    "Feedback:", "feedback\n", "<feedback>", "</score>", "overall ", "final ", "I give ",
    "I give 1 ", "I'd give it 1 because ", "this deserves a score of ", "1 is excellent, ",
    "1 is excellent, \n", "excellent ", "excellent 1", "####", "#### ", "#### x ", "####\n",
    "\\boxed{", "\\boxed", "\\frac{", "\\frac{1}{", "{", "}", "\\", "0", "1 ", "1.", "1,000", "1e",
    "$-", "%", "- ", "-", "*", "**", "'", "```", "> ", " ", "\t", "\n", "\n ", "\n\n \n", "the ",
    "x = ", "<<", "<<1+", "<<1+1=2>>", "Step 1 should be ", "\u00bd", "</think>", "<think>", "a",
    "1.234.", "1 million ", "million", "is minus 1 ", "1 h and ", "|-1", "1,000", "\\frac{1}{1}",
    "a:1,b", "<answer>", "</answer>", "<answer>1</answer>", "\nAnswer: 5", "#### Answer\n", "** ",
    "#", "[", "7", "7,777", "1/", "I give 1", "feedback", '{"score":', "e1", ".1", "$", "x10^",
    ", ", "5 000 ", "12 500 ", "12 500 km ", "$12 500 is ", " 500", "million ", "1.000,", "\u0661",
    "1 1/", "1,", "\t\n",
]  # fmt: skip

RIGHT = "Step 1: <<1+1=2>>2\n#### 2"


def weights(text):
    spans = [(k, k + 1) for k in range(len(text))]
    return step_weights(text, spans, answer_span(text))


READERS = {
    "parse_feedback": parsing.parse_feedback,
    "final_answer": parsing.final_answer,
    "strict": lambda text: parsing.final_answer(text, "strict"),
    "flexible": lambda text: parsing.lm_eval_match(text, text, "flexible"),
    "number": parsing.number,
    "is_number": parsing.is_number,
    "final_text": parsing.final_text,
    "gold_part": parsing.gold_part,
    "compared": compared,
    "written": written,
    "needs_merge": lambda text: parsing.needs_merge(
        prompts.Feedback(text, None), prompts.Feedback(f"{text}.", None)
    ),
    "judge": lambda text: arithmetic.error_span(RIGHT, text),
    "first_error": arithmetic.first_error,
    "predicted_step": processbench.predicted_step,
    "lesson": reflection.lesson,
    "noisy": lambda text: noise.noisy(text, "typed", 0.4, 0),
    "answer_span": answer_span,
    "answer_span of a text": lambda text: answer_span(text, number=False),
    "step_weights": weights,
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_linear(name):
    read = READERS[name]
    size = 1_500 if name == "noisy" else 4_000  # a random generator is seeded for each word
    for unit in by_day(UNITS):
        short, long = ((unit * 16_000)[:length] + "x" for length in (size, 4 * size))
        if patterns.seconds(read, long, 1) < 0.03:
            continue
        growth = min(
            patterns.seconds(read, long, 2) / patterns.seconds(read, short, 2) for _ in range(2)
        )
        assert growth < 8, (unit, growth)  # four times the length: 4, and quadratic 16


LABELS = ("Score: 1 ", "Score: 1/", "score (", "I give ", "Feedback:", "\n", "####", "\\boxed{")


@pytest.mark.parametrize("unit", by_day(LABELS, 4))
def test_a_megabyte_and_a_half_takes_seconds_at_most(unit):
    """It was 27 s: around each label the whole text was copied."""
    text = unit * (1_600_000 // len(unit))
    assert patterns.seconds(parsing.parse_feedback, text, 1) < 6
    assert patterns.seconds(parsing.final_answer, text, 1) < 6
    assert patterns.seconds(answer_span, text, 1) < 6


def test_many_labels_and_marks_are_read_as_few_are():
    """Above the limits, of which no text of a model comes near, the first and the last count."""
    many = 3 * feedbacks._MAX_LABELS
    assert parsing.parse_feedback("Score: 0.5\n" + "Score: x\n" * many).written_score == 0.5
    assert parsing.parse_feedback("Score: x\n" * 5000 + "Score: 0.5\n").written_score == 0.5
    assert parsing.final_answer("#### 1\n" + "#### x\n" * 5000) == 1
    assert parsing.final_answer("#### x\n" * many + "#### 7\n") == 7


# --------------------------------------------------------------------- what must not have changed


def spelled_out_answer_span(text, mark="####"):
    """By its definition, with no thought of time."""
    for place in reversed(range(len(text))):
        if text.startswith(mark, place):
            rest = text[place + len(mark) :].lstrip()
            line = rest.partition("\n")[0].rstrip()
            if any(char.isdigit() for char in line):
                return place, len(text) - len(rest) + len(line)
    return None


def spelled_out_step_weights(text, spans, answer):
    stop = len(text) if answer is None else answer[0]
    line = text.count("\n", 0, len(text) - len(text.lstrip()))
    lines = []
    for begin, end in spans:
        if word := text[begin:end].lstrip():
            line = text.count("\n", 0, end - len(word))
        lines.append(line if end <= stop else None)
    return [0.0 if line is None else 1 / lines.count(line) for line in lines]


def test_spans_and_weights_are_as_defined():
    rng = random.Random(0)
    pieces = ["#### ", "####", "\n", " ", "5", "\u00b2", "\u0665", "eggs", ".", "\x1c", "\u2003"]
    found = set()
    for _ in range(draws(5000)):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        span = answer_span(text)
        # Marks do not overlap, from the right.
        if "#####" not in text:
            assert span == spelled_out_answer_span(text), text
        found.add(span is None)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        spans = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
        assert step_weights(text, spans, span) == spelled_out_step_weights(text, spans, span)
    assert found == {True, False}


def test_noise_on_a_question_is_what_it_was():
    question = "Tom has 23 apples and buys 15 more, how many does he have now?"
    assert noise.noisy(question, "transcribed", 0.5, 3) == (
        "Tom as 23 apple's and byes fifteen more, how meny does he halve nough?"
    )
    long = question * 200
    words = noise.noisy(long, "typed", 0.4, 0)
    assert words != long and words == noise.noisy(long, "typed", 0.4, 0)
    hit = np.mean([a != b for a, b in zip(words.split(), long.split(), strict=True)])
    assert 0.2 < hit < 0.4  # numbers are safe, and so are words whose slip leaves them as they are
