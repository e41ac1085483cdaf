"""Advantages: numbers against a forward pass by hand, tokens in their part, the table, the page."""

import json
import math
import re
from html.parser import HTMLParser

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_fd.cli.app import cli
from mlx_fd.config import Config, override
from mlx_fd.errors import UserError
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.problems import arithmetic
from mlx_fd.report.advantage_page import chosen, in_words, page, shade, visible
from mlx_fd.training.selfdistill.advantage import (
    AFTER,
    BEFORE,
    IN,
    RIGHT,
    attempts_of,
    check_known,
    parts_of,
    pieces_of,
    score,
    summarise,
)
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Materials
from support.reported import scored as scored_by_hand

TRUTH = Materials(truth=True)


def nothing(*_):
    """No progress is shown."""


@pytest.fixture(scope="module")
def base():
    return load(resolve("tiny-base"))


@pytest.fixture(scope="module")
def problems():
    return arithmetic.load("validation").problems[:6]


@pytest.fixture(scope="module")
def scored(base, problems):
    config = override(Config(), {"num_generations": 3, "max_answer_tokens": 64, "seed": 5}, "test")
    attempts = attempts_of(base, problems, config, nothing)
    return score(base, attempts, ["reference", "step-critique", "sibling"], TRUTH, nothing)


# --------------------------------------------------------------------------------- first wrong step

SOLUTION = "Step 1: <<3+4=7>>7\nStep 2: <<7*2=14>>14\n#### 14"


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (SOLUTION, None),
        ("Step 1: <<4+3=7>>7\nStep 2: <<7*2=14>>14\n#### 14", None),
        ("Step 1: <<3+4=8>>8\nStep 2: <<8*2=16>>16\n#### 16", "Step 1: <<3+4=8>>8"),
        ("Step 1: <<3+4=7>>7\nStep 2: <<7+2=9>>9\n#### 9", "Step 2: <<7+2=9>>9"),
        ("Step 1: <<3+4=7>>7\n#### 7", "#### 7"),
        ("Step 1: <<3+4=7>>7\nStep 2: <<7*2=14>>14\n#### 41", "#### 41"),
        (f"{SOLUTION[:-8]}\nStep 3: <<14+1=15>>15\n#### 15", "Step 3: <<14+1=15>>15"),
        ("Step 1: <<3+4=7>>7", ""),
        ("no idea", ""),
    ],
)
def test_the_first_wrong_step_is_found_in_the_text(answer, wrong):
    span = arithmetic.error_span(SOLUTION, answer)
    if wrong is None:
        assert span is None
    else:
        assert answer[slice(*span)] == wrong
        assert span[0] < span[1]  # a missing end still has the place of the next token


def test_tokens_are_before_in_and_after():
    pieces = ("Step 1: <<", "3", "=7", ">>", "7", "\nStep 2: <<", "9", ">>", "9", "\n#### ", "9")
    text = "".join(pieces)
    span = (text.index("Step 2"), text.index("\n####"))
    assert parts_of(pieces, span) == (BEFORE,) * 5 + (IN,) * 4 + (AFTER,) * 2
    assert parts_of(pieces, None) == (RIGHT,) * 11
    end = (len(text), len(text) + 1)
    assert parts_of((*pieces, "<|end|>"), end) == (BEFORE,) * 11 + (IN,)


def test_pieces_are_the_text(base):
    text = f"{SOLUTION}\u00e9\u4e2d!"
    tokens = base.tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(base.tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


# ------------------------------------------------------------------------------------------ numbers


def by_hand(loaded, message, tokens):
    """Log-probabilities of tokens after a message, one forward pass, float64."""
    prompt = first_prompt(loaded, message)
    logits = loaded.model(mx.array([[*prompt, *tokens]]))[0]
    rows = np.array(logits, dtype=np.float64)[len(prompt) - 1 : -1, : loaded.vocab]
    rows -= np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) + rows.max(
        -1, keepdims=True
    )
    return rows[np.arange(len(tokens)), list(tokens)]


def test_advantages_are_the_difference_of_two_readings(base, scored):
    attempts = [item.attempt for item in scored]
    for name in ("reference", "step-critique", "sibling"):
        views = CONTEXTS[name].views(attempts, TRUTH)
        for item, view in list(zip(scored, views, strict=True))[::4]:
            tokens = item.attempt.tokens
            expected = by_hand(base, view.teacher, tokens) - by_hand(base, view.student, tokens)
            np.testing.assert_allclose(item.advantages[name], expected, atol=2e-4)


def test_a_context_that_says_nothing_more_has_no_advantage(base, scored):
    attempts = [item.attempt for item in scored[:4]]
    for item in score(base, attempts, ["none", "clean"], TRUTH, nothing):
        for name in ("none", "clean"):
            assert max(map(abs, item.advantages[name])) < 1e-4


def test_the_base_is_told_where_it_fails(base, scored):
    """Item 3 of the bench: the mass of a step-aligned critique is in the first wrong step."""
    row = summarise(scored, "step-critique")
    assert row.mean[IN].value < -0.1
    assert abs(row.mean[BEFORE].value) < 0.1
    assert row.mass_in.value > row.tokens_in.value


def test_only_generated_problems_are_known(problems):
    other = problems[0].__class__("g1", "?", "3 + 4 = <<3+4=7>>7 eggs\n#### 7", problems[0].answer)
    check_known(problems)
    with pytest.raises(UserError, match="g1: the first wrong step"):
        check_known([*problems, other])


# -------------------------------------------------------------------------------------------- table


def test_the_table_by_hand(problems):
    one, two = problems[:2]
    rows = [
        scored_by_hand(one, [BEFORE, IN, IN, AFTER], [0.5, -2.0, -1.0, -0.5]),
        scored_by_hand(one, [RIGHT, RIGHT], [0.2, -0.4]),
        scored_by_hand(two, [BEFORE, BEFORE, IN], [-0.005, -1.0, 2.0]),
        scored_by_hand(two, [RIGHT], None),
    ]
    found = summarise(rows, "reference")
    assert (found.attempts, found.wrong) == (3, 2)
    assert found.tokens == {RIGHT: 2, BEFORE: 3, IN: 3, AFTER: 1}
    assert found.mean[BEFORE].value == pytest.approx((0.5 - 0.005 - 1) / 3)
    assert found.mean[IN].value == pytest.approx(-1 / 3)
    assert found.mean[AFTER].value == pytest.approx(-0.5)
    assert found.mean[RIGHT].value == pytest.approx(-0.1)
    assert found.mass_in.value == pytest.approx(5 / (5 + 0.5 + 0.5 + 1.005))
    assert found.tokens_in.value == pytest.approx(3 / 7)
    assert found.negative.value == pytest.approx(2 / 5)  # -0.005 is none
    assert found.mass_in.low <= found.mass_in.value <= found.mass_in.high
    assert found.mass_in.n == 2  # problems
    # One of two problems has tokens after a first wrong step: its resamples are all alike.
    assert math.isnan(found.mean[AFTER].low) and math.isnan(found.mean[AFTER].high)
    empty = summarise([scored_by_hand(two, [RIGHT], None)], "reference")
    assert empty.attempts == 0
    assert math.isnan(empty.mean[IN].value)
    assert json.loads(json.dumps(empty.to_json()))["mass_in"]["value"] is None


# --------------------------------------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.said, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_is_whole_and_shows_each_token(scored):
    rows = [summarise(scored, name) for name in ("reference", "step-critique")]
    student_lm = Reader()
    student_lm.feed(page("tiny-base", rows, scored))
    assert not student_lm.open
    shown = chosen(scored)
    titles = [a["title"] for tag, a in student_lm.tags if tag == "span" and "title" in a]
    wanted = [f"{v:+.2f}" for i in shown for values in i.advantages.values() for v in values]
    assert titles == wanted
    text = "".join(student_lm.said)
    for one in shown:
        assert one.attempt.question in text
        for name in one.advantages:
            assert in_words(one, name) in text
    outside = [
        a for _, a in student_lm.tags if not a.get("href", a.get("src", "#")).startswith("#")
    ]
    assert not outside


def test_text_of_models_and_problems_is_escaped(problems):
    evil = "<script>alert(1)</script>&\x07\u202e"
    problem = problems[0].__class__("x", evil, SOLUTION, problems[0].answer)
    bad = scored_by_hand(problem, [BEFORE, IN], [0.0, -3.0], evil, (evil, evil))
    html = page(evil, [summarise([bad], "reference")], [bad])
    assert "<script" not in html
    assert "\x07" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html
    student_lm = Reader()
    student_lm.feed(html)
    assert not student_lm.open


def test_shades_and_words(problems):
    assert [shade(v) for v in (0, 0.09, 0.1, 0.6, 3, 9)] == ["", "", "f1", "f2", "f3", "f4"]
    assert [shade(v) for v in (-0.09, -0.2, -0.5, -2, -5)] == ["", "a1", "a2", "a3", "a4"]
    assert visible("\n<\x07") == "\u21b5\n<\N{REPLACEMENT CHARACTER}"
    told = in_words(scored_by_hand(problems[0], [BEFORE, IN, AFTER], [1, -4, -1]), "reference")
    assert told == (
        "3 tokens, 1 with positive advantage, 2 negative; most negative at 't1' in the first wrong "
        "step, -4.0."
    )
    assert in_words(scored_by_hand(problems[0], [RIGHT], [0.0]), "reference") == (
        "1 tokens, 0 with positive advantage, 0 negative."
    )


def test_shown_attempts_are_at_different_problems(scored):
    found = chosen(scored, wrong=2, right=1)
    assert len({i.attempt.problem.id for i in found}) == len(found)
    assert sum(RIGHT in i.parts for i in found) <= 1


# ---------------------------------------------------------------------------------------- command


def test_the_command_writes_a_page_and_numbers(tmp_path):
    out = tmp_path / "found"
    arguments = ["advantage", "tiny-base", "--limit", "3", "--samples", "2", "--out", str(out)]
    arguments += ["--contexts", "step-critique,feedback"]
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report == json.loads((out / "advantage.json").read_text())
    assert report["attempts"] == 6
    assert [row["context"] for row in report["contexts"]] == ["step-critique", "feedback"]
    assert "Per-token advantages of each context" in (out / "advantage.html").read_text()
    again = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert again.output.startswith("context")
    assert json.loads((out / "advantage.json").read_text()) == report


def test_contexts_that_teach_no_attempt_are_rows_of_the_table(tmp_path):
    out = tmp_path / "found"
    arguments = ["advantage", "tiny-base", "--limit", "2", "--samples", "1", "--out", str(out)]
    arguments += ["--contexts", "contrast,reference"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    # Wrong hints come from other answers, and there is one attempt at each problem.
    assert re.search(r"^contrast +none +0 +n/a", done.output, re.MULTILINE)
    assert "no attempt gave these contexts any input (more --samples?): contrast\n" in done.output
    found = json.loads((out / "advantage.json").read_text())["contexts"]
    assert [row["attempts"] for row in found] == [0, 2]
    html = (out / "advantage.html").read_text()
    assert "<td>none <small>0 wrong</small></td>" in html and "nan" not in html.lower()


def test_an_unknown_context_is_refused_with_the_known_ones(tmp_path):
    done = CliRunner().invoke(
        cli, ["advantage", "tiny-base", "--out", str(tmp_path / "x"), "--contexts", "step-critic"]
    )
    assert done.exit_code == 2
    assert "'step-critic' is not one of 'none', 'reference'," in done.output
    assert 'did you mean "step-critique"?' in done.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--problems", "gsm8k", "--split", "test"], "known for generated problems only"),
        (["--critic", "tinny"], "tinny"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, wanted, tmp_path):
    done = CliRunner().invoke(
        cli, ["advantage", "tiny-base", "--out", str(tmp_path / "x"), *arguments]
    )
    assert isinstance(done.exception, UserError)
    assert wanted in str(done.exception)
    assert not (tmp_path / "x").exists()
