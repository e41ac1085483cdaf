"""The shipped base of self-distillation: its tokens fit the contexts, it uses them, its script."""

import json
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
