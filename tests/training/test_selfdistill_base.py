"""The shipped base of self-distillation: its tokens fit the contexts, it uses them, its script."""

import json
import random
import re
import subprocess
import sys

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.problems import arithmetic
from support.draws import nightly
from support.scripted import SCRIPTS, script


@pytest.fixture(scope="module", name="script")
def base_script():
    return script("train_selfdistill_base")


def test_each_piece_of_a_context_is_one_token(script):
    tokenizer = load_tokenizer(resolve("tiny-base"))
    for piece in script.context_pieces():
        if piece.strip():
            assert len(tokenizer.encode(piece, add_special_tokens=False)) == 1, (
                f"{piece!r}: the contexts' messages are no longer those that the tiny base was "
                "trained on: retrain it"
            )


def test_the_tokens_of_the_pair_are_where_they_were():
    pair, base = (load_tokenizer(resolve(name)).get_vocab() for name in ("tiny", "tiny-base"))
    assert {token: base.get(token) for token in pair} == pair
    assert len(base) > len(pair)


def test_the_base_answers_better_with_a_context_and_not_well_without(script):
    figures = json.loads((resolve("tiny-base") / "figures.json").read_text())
    shares = {k: v["right"] / v["of"] for k, v in figures["splits"]["test"].items()}
    assert 0.3 < shares["none"] < 0.7
    for name in ("reference", "step-critique", "feedback", "demonstration", "sibling"):
        assert shares[name] > shares["none"] + 0.1, name
    seen = script.evaluate(load(resolve("tiny-base")), "test", 40)
    for name in ("none", "step-critique"):
        assert abs(seen[name]["right"] / 40 - shares[name]) < 0.2, name


def test_new_embeddings_are_the_mean_of_what_the_token_was_split_into(script):
    old, new = script.make_tokenizer(), script.base_tokenizer()
    weights = script.cut(resolve("tiny"), 96)
    wide = dict(script.widened(weights, old, new))["model.embed_tokens.weight"]
    narrow = dict(weights)["model.embed_tokens.weight"]
    assert wide.shape == (new.get_vocab_size(), narrow.shape[1])
    token = new.token_to_id(" twenty")
    parts = old.encode(" twenty", add_special_tokens=False).ids
    assert len(parts) > 1
    mean = sum(narrow[part] for part in parts) / len(parts)
    assert float(abs(wide[token] - mean).max()) < 1e-5
    assert bool((wide[: narrow.shape[0]] == narrow).all())


def test_who_misreads_takes_every_product_for_a_sum(script):
    event, step = arithmetic._Event, arithmetic.Step
    question = "Ann has 10 pens. The number of pens doubles. Ann buys 3 bags with 5 pens each."
    events = (event("*", 2), event("g", 3, 5), event("-", 1))
    right = arithmetic._steps(10, events)
    drawn = arithmetic.Exercise(question, 10, events, right)
    read = script.misread(drawn)
    assert read.question == question
    assert read.steps == (
        step(10, "+", 2, 12), step(3, "+", 5, 8), step(12, "+", 8, 20), step(20, "-", 1, 19)
    )  # fmt: skip
    assert arithmetic.judge(drawn.solution, read.solution).first_error == 1
    plain = (event("+", 3), event("-", 1))
    assert script.misread(arithmetic.Exercise("", 10, plain, arithmetic._steps(10, plain))) is None
    # 10 + 2 - 15 would be below the range.
    below = (event("*", 2), event("-", 15))
    assert script.misread(arithmetic.Exercise("", 10, below, arithmetic._steps(10, below))) is None


def test_bare_solutions_are_misread_as_often_as_asked_and_otherwise_right(script):
    rng, seen = random.Random(0), []
    for drawn, _ in zip(arithmetic.exercises("train", 1), range(400), strict=False):
        (_, solution, _) = (text for text, _ in script.bare_sequence(rng, drawn, 0.8))
        if other := script.misread(drawn):
            assert solution in (other.solution, drawn.solution)
            seen.append(solution == other.solution)
        else:
            assert solution == drawn.solution
    assert len(seen) > 150
    assert 0.72 < sum(seen) / len(seen) < 0.88


def test_a_context_says_what_comes_after_it_also_where_it_is_the_misreading(script, monkeypatch):
    monkeypatch.setattr(script, "SAY_THE_MISREADING", 0.5)
    monkeypatch.setattr(script, "TAUGHT", ("reference", "rubric", "step-critique"))
    monkeypatch.setattr(script, "SHARES", [1, 1, 1])
    rng, misread = random.Random(0), 0
    for drawn, _ in zip(arithmetic.exercises("train", 2), range(200), strict=False):
        prompt, solution, _ = (text for text, _ in script.context_sequence(rng, drawn, True))
        steps, final = arithmetic.read(solution)
        misread += solution != drawn.solution
        if "A good answer meets" in prompt:
            verbs = {"+": "adds", "-": "subtracts", "*": "multiplies"}
            said = re.findall(r"The \w+ step (\w+)\.", prompt)
            assert said == [verbs[step.op] for step in steps]
        else:
            assert f"{final}" in prompt.split("\n\n")[1]
    assert 20 < misread < 100


def test_training_problems_are_none_of_the_benchs():
    for drawn, _ in zip(arithmetic.exercises("train", 7), range(300), strict=False):
        assert arithmetic.split_of(drawn.question) == "train"


@nightly
def test_the_script_trains(tmp_path):
    subprocess.run(
        [sys.executable, SCRIPTS / "train_selfdistill_base.py", "--quick", "--out", tmp_path],
        check=True,
        capture_output=True,
    )
    made = load(tmp_path / "base")
    assert made.vocab == load(resolve("tiny-base")).vocab
    assert "| step-critique |" in (tmp_path / "base" / "README.md").read_text()
