"""The shipped pair: its tokenizer still fits the prompts, its figures hold, its script runs."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from fractions import Fraction

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from mlx_fd.config import EpisodeOptions, GenerationOptions, ModelOptions
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.turns import answer, expert_feedback, judge, merge_and_revise, student_feedback
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.generation import first_prompt, followup_prompt
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import default_student, resolve
from mlx_fd.models.student import make_student
from mlx_fd.problems import arithmetic, parsing, prompts
from mlx_fd.problems import load as load_problems
from support.draws import ALL, nightly
from support.scripted import SCRIPTS, script

SCRIPT = SCRIPTS / "train_tiny.py"
RETRAIN = "the prompts of roles.py are no longer those that the tiny pair was trained on: retrain"


@pytest.fixture(scope="module", name="script")
def train_tiny():
    return script("train_tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("tiny"))


@pytest.fixture(scope="module")
def expert():
    return load(resolve("tiny"))


@pytest.fixture(scope="module")
def student():
    return load(resolve("tiny-student"))


# -------------------------------------------------------------------------------------- tokenizer


def test_every_prompt_is_a_handful_of_tokens(expert):
    said = prompts.Feedback("?", None)
    lengths = {
        "answer": len(first_prompt(expert, prompts.answer_prompt("?"))) - 1,
        "feedback": len(feedback_request(expert)) - 1,
        "merge": len(followup_prompt(expert, prompts.merge_prompt(said, said))) - 4,
        "revise": len(followup_prompt(expert, prompts.revise_prompt(""))),
        "revise by": len(followup_prompt(expert, prompts.revise_prompt("?"))) - 2,
        "critique": len(followup_prompt(expert, prompts.critique_prompt())),
        "final": len(followup_prompt(expert, prompts.final_prompt())),
    }
    # End of turn, user, the prompt, assistant; the first message has no end before it.
    assert lengths == {**dict.fromkeys(lengths, 4), "answer": 3}, RETRAIN


def test_prompts_are_those_of_the_training(tokenizer, expert, script):
    """The strings that training sequences are put together from give the very tokens of a run."""
    user, assistant, end = script.USER, script.ASSISTANT, script.END
    question = "Tom has 7 apples. How many apples are left?"
    start = f"{user}{prompts.answer_prompt(question)}{assistant}"
    assert tuple(tokenizer.encode(start)) == first_prompt(expert, prompts.answer_prompt(question))
    ask = f"{end}{user}{prompts.feedback_prompt()}{assistant}{prompts.FEEDBACK_OPENING}"
    assert tuple(tokenizer.encode(ask)) == feedback_request(expert)
    for prompt in (prompts.revise_prompt("Step 1 should be"), prompts.critique_prompt()):
        text = f"{end}{user}{prompt}{assistant}"
        assert tuple(tokenizer.encode(text)) == followup_prompt(expert, prompt)


def test_every_word_of_the_generator_is_one_token(tokenizer):
    for split in arithmetic.SPLITS:
        for problem in load_problems("arithmetic", split).problems[:200]:
            for word in problem.question.split()[1:]:
                plain = word.strip(".?")
                ids = tokenizer.encode(f" {plain}")
                expected = 1 + len(plain) if plain.isdigit() else 1
                assert len(ids) == expected, (word, ids)
            assert tokenizer.decode(tokenizer.encode(problem.solution)) == problem.solution


@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer):
    for text in ("12-3=9>>9", "-0.5", "#### 47", "<<10*9=90>>90"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([i]) for i in ids]
        assert all(p.isdigit() <= (len(p) == 1) for p in pieces)
        assert sum(p.isdigit() for p in pieces) == sum(c.isdigit() for c in text)


# ------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("name", ["tiny", "tiny-hard"])
def test_both_share_a_tokenizer_and_are_small(name):
    folders = [resolve(name), resolve(f"{name}-student")]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        one, two = ((folder / file).read_bytes() for folder in folders)
        assert one == two
    size = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    assert size < 4_000_000
    assert default_student(name) == f"{name}-student"
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "llama"
        assert config["quantization"]["group_size"] in (32, 64)


@pytest.mark.parametrize("name", ["tiny", "tiny-student", "tiny-hard", "tiny-hard-student"])
def test_the_card_gives_the_figures_of_its_file(name, script):
    folder = resolve(name)
    figures = json.loads((folder / "figures.json").read_text())
    card = (folder / "README.md").read_text()
    for seen in figures["splits"].values():
        for measure, words in script.MEASURES.items():
            right, of = seen[measure]["right"], seen[measure]["of"]
            low, high = script.wilson(right, of)
            assert low <= right / of <= high
            assert words in card
            assert f"{right / of:.1%} ({low:.1%} to {high:.1%}; n = {of})" in card
        assert f" {script.f1(seen):.1%} |" in card
    assert f"{figures['parameters']:,} parameters" in card
    assert f"{sum(stage['steps'] for stage in figures['training']):,} steps" in card
    assert ALIASES[name].note.startswith(f"{figures['parameters'] / 1e6:.1f}M parameters")


def test_wilson_against_published_values(script):
    # Newcombe 1998, table I: 81/263 and 0/20.
    assert script.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert script.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


# ----------------------------------------------------------------------------------------- figures


def test_the_figures_hold(expert, student, script):
    """What the cards say is found again on the first problems of the test split."""
    count = 60 if ALL else 30
    for loaded, name in ((expert, "tiny"), (student, "tiny-student")):
        figures = json.loads((resolve(name) / "figures.json").read_text())["splits"]["test"]
        for measure, seen in script.evaluate(loaded, "test", count).items():
            low, high = script.wilson(seen["right"], seen["of"])
            claimed = figures[measure]["right"] / figures[measure]["of"]
            assert low - 0.03 <= claimed <= high + 0.03, (name, measure, seen)


def shares(name):
    """Of each measure on the test split the share that is right, as the model's figures say."""
    figures = json.loads((resolve(name) / "figures.json").read_text())
    return {k: v["right"] / v["of"] for k, v in figures["splits"]["test"].items()}


def test_there_is_something_to_distil():
    expert, student = shares("tiny"), shares("tiny-student")
    assert expert["answers"] >= 0.95
    assert expert["first_error"] >= 0.9
    assert expert["score_sign"] >= 0.9
    assert expert["revised"] >= 0.9
    assert 0.3 <= student["answers"] <= 0.6
    assert student["first_error"] <= 0.6
    assert student["first_error_when_wrong"] <= 0.4
    assert student["parsable"] >= 0.5


def test_the_hard_expert_judges_better_than_it_answers():
    expert, student = shares("tiny-hard"), shares("tiny-hard-student")
    assert 0.65 <= expert["answers"] <= 0.85
    assert expert["first_error"] >= 0.9
    assert expert["final_after_check"] >= expert["answers"]
    assert student["answers"] < expert["answers"]
    assert student["first_error_when_wrong"] <= 0.4


def test_an_episode(expert):
    """The expert mends a wrong answer of its own conversation, through the package's six steps."""
    problems = load_problems("arithmetic", "validation").problems[:6]
    options = GenerationOptions(max_answer_tokens=96, max_feedback_tokens=96, max_merge_tokens=96)
    answered = answer(expert, problems, options, 0, lambda *_: None)
    assert sum(a.answer.final == p.answer for a, p in zip(answered, problems, strict=True)) >= 5
    assert all(one.answer.final == str(Fraction(one.answer.final)) for one in answered)
    pair = _pair(expert)
    students = student_feedback(pair, answered, options, 0, lambda *_: None)
    experts = expert_feedback(pair, answered, options, 0, lambda *_: None)
    judged = judge(answered, students, dict(enumerate(experts)))
    finished = merge_and_revise(
        pair, judged, options, EpisodeOptions(), lambda _: 0, lambda *_: None
    )
    assert all(not one.usage.capped for one in judged)
    right = [one.final.final == p.answer for one, p in zip(finished, problems, strict=True)]
    assert sum(right) >= 5
    assert all(arithmetic.first_error(one.critique) is not None for one in finished if one.critique)


def _pair(expert):
    student_lm = load(resolve("tiny-student"))
    made = make_student(student_lm.view, 128, ModelOptions(), 0)
    vocab = expert.config["vocab_size"]
    return Pair(expert, made, dataclasses.replace(student_lm, model=made.model), vocab)


# ------------------------------------------------------------------------------------------ script


def test_the_fast_forward_is_the_models(script):
    model, _ = script.make_model(script.RECIPES["tiny"]["student"], script.make_tokenizer())
    mx.random.seed(0)
    x, w = mx.random.randint(0, 400, (3, 20)), mx.random.uniform(shape=(3, 20))

    def plain(model, x, w):
        each = nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:])
        return (each * w[:, 1:]).sum() / w[:, 1:].sum()

    expected, expected_gradients = nn.value_and_grad(model, plain)(model, x, w)
    got, gradients = nn.value_and_grad(model, script.loss)(model, x, w)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for (_, a), (_, b) in zip(
        tree_flatten(expected_gradients), tree_flatten(gradients), strict=True
    ):
        assert mx.abs(a - b).max().item() <= 1e-4 * mx.abs(a).max().item()


@pytest.mark.parametrize("how", ["answer", "feedback", "full"])
def test_training_sequences(script, how):
    """What is imitated is right, and it is what a right assistant writes in an episode."""
    stream, rng = arithmetic.exercises("train", 11), random.Random(11)
    for _ in range(200):
        drawn = next(stream)
        pieces = script.conversation(rng, drawn, how)
        turns = "".join(text for text, _ in pieces).split(script.ASSISTANT)[1:]
        replies = [turn.split(script.END)[0] for turn in turns]
        if how != "feedback":
            assert replies[-1] == drawn.solution
        for text, weight in pieces:
            if weight:
                assert set(arithmetic.read(text)[0]) <= set(drawn.steps)
        if len(replies) > 1 and replies[1].startswith(prompts.FEEDBACK_OPENING):
            said = arithmetic.feedback(drawn.solution, replies[0])
            assert parsing.parse_feedback(replies[1]) == said


def test_a_hasty_expert_learns_wrong_answers_and_right_feedback(script):
    stream, rng = arithmetic.exercises("train", 13, steps=(3, 4)), random.Random(13)
    for _ in range(100):
        drawn = next(stream)
        prompt, answer, end = script.conversation(rng, drawn, "answer", hasty=1.0)
        assert arithmetic.judge(drawn.solution, answer[0]).first_error
        assert (prompt[1], answer[1], end[1]) == (0, 1, 1)
        pieces = script.conversation(rng, drawn, "full", hasty=1.0)
        for text, weight in pieces:
            if weight:
                assert set(arithmetic.read(text)[0]) <= set(drawn.steps)
        asked = next(k for k, (text, _) in enumerate(pieces[1:], 1) if script.USER in text)
        assert not any(weight for _, weight in pieces[:asked])


def test_careless_feedback_sees_the_error_and_finds_it_right(script):
    stream, rng = arithmetic.exercises("train", 12), random.Random(12)
    for _ in range(100):
        drawn = next(stream)
        answer = arithmetic.wrong_answer(rng, drawn)
        said = arithmetic.careless_feedback(drawn.solution, answer)
        assert arithmetic.first_error(said.text) == 0 and said.written_score == 1
        steps, final = arithmetic.read(answer)
        for step in (*drawn.steps[: len(steps)], *steps[: len(drawn.steps)], final):
            assert str(step) in said.text
    assert arithmetic.careless_feedback(drawn.solution, drawn.solution) == arithmetic.feedback(
        drawn.solution, drawn.solution
    )


def test_a_student_is_cut_out_of_the_expert(script, expert):
    """Each neuron that is kept is one of the expert's, whole; the heaviest is among them."""
    cut = dict(script.cut(resolve("tiny"), 96))
    for k, layer in enumerate(expert.model.layers):
        mlp = layer.mlp
        norms = [mx.linalg.norm(p.weight, axis=1) for p in (mlp.gate_proj, mlp.up_proj)]
        heaviest = mx.argmax(norms[0] * norms[1] * mx.linalg.norm(mlp.down_proj.weight, axis=0))
        gate, up, down = (
            cut[f"model.layers.{k}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        kept = [mx.argmin(mx.abs(mlp.gate_proj.weight - row).sum(axis=1)).item() for row in gate]
        assert len(set(kept)) == 96 and heaviest.item() in kept
        assert mx.array_equal(up, mlp.up_proj.weight[mx.array(kept)])
        assert mx.array_equal(down, mlp.down_proj.weight[:, mx.array(kept)])


@nightly
def test_the_script_runs_and_repeats(tmp_path):
    def run(out, *options):
        command = [sys.executable, str(SCRIPT), "--quick", *options, "--out", str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    alone = run(tmp_path / "b", "--only", "student")
    assert alone.returncode == 2 and "there is none in" in alone.stderr
    both = run(tmp_path / "a")
    assert both.returncode == 0, both.stderr
    shutil.copytree(tmp_path / "a" / "expert", tmp_path / "b" / "expert")
    student = run(tmp_path / "b", "--only", "student")
    assert student.returncode == 0, student.stderr
    one, two = (tmp_path / run / "student" for run in ("a", "b"))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / "README.md").exists()
    assert load(one).config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}


@nightly
def test_the_script_makes_the_hard_pair(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--pair", "tiny-hard"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expert, student = (load(tmp_path / name).config for name in ("expert", "student"))
    assert (expert["hidden_size"], expert["intermediate_size"]) == (128, 384)
    assert student["intermediate_size"] == 96
    assert "trained on from the tiny expert" in (tmp_path / "expert" / "README.md").read_text()
