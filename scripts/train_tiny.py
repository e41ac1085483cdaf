"""Train the embedded pair from nothing on a CPU: tokenizer, expert, student, and their cards.

python scripts/train_tiny.py --out DIR            # both, about 43 minutes of one core
python scripts/train_tiny.py --out DIR --quick    # hardly any training: tests the script
python scripts/train_tiny.py --out DIR --pair tiny-hard    # goes on from the shipped expert

The student is cut out of the expert: python scripts/train_tiny.py --out DIR --only student
takes the one in DIR/expert, and half a minute.

Results repeat to the bit only with the same number of BLAS threads; it asks for one.
"""

# ruff: noqa: E402
import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_fd.feedback.criticism import feedback_request, parsed
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, followup_prompt, generate
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.writing import Sampling, Turn
from mlx_fd.problems import arithmetic, parsing
from mlx_fd.problems.arithmetic import Exercise
from mlx_fd.problems.prompts import (
    FEEDBACK_OPENING,
    Feedback,
    answer_prompt,
    critique_prompt,
    feedback_prompt,
    final_prompt,
    format_feedback,
    merge_prompt,
    revise_prompt,
)

# Of each measure how many (right) of how many (of), and what else is shown of it.
Seen = dict[str, dict[str, Any]]

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# How Qwen2 splits text before the merges: digits one by one, and llama.cpp knows it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# -------------------------------------------------------------------------------------- tokenizer


def prompt_pieces() -> list[str]:
    """The fixed pieces of every prompt of the roles: each becomes one token."""
    one, two = "\u241fone\u241f", "\u241ftwo\u241f"
    prompts = [
        answer_prompt(one),
        feedback_prompt(),
        merge_prompt(Feedback(one, None), Feedback(two, None)),
        revise_prompt(one),
        revise_prompt(""),
        critique_prompt(),
        final_prompt(),
        FEEDBACK_OPENING,
    ]
    pieces = [piece for p in prompts for piece in p.replace(two, one).split(one) if piece]
    return list(dict.fromkeys(pieces))


def phrases() -> list[str]:
    """What the models write again and again, a token each; numbers are never part of them."""
    steps = range(1, arithmetic.MAX_STEPS + 3)
    return [
        "Step 1: <<",
        *(f"\nStep {k}: <<" for k in steps[1:]),
        *(f"Step {k} should be " for k in steps),
        *(f"Step {k} should not be there." for k in steps),
        *(f": {kind}." for kind in arithmetic.KINDS),
        arithmetic.ALL_RIGHT,
        "\n#### ",
        "\nFeedback: ",
        "\nFinal score:",
        ", it is ",
        ": right. ",
        "missing.",
        "The final answer should be ",
        ">>",
    ]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every word of the generator is one token, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Each word as often as any other, so that the tokens do not hang on the shares of the draws.
    words = set()
    for split in ("train", "transfer"):
        drawn = arithmetic.exercises(split, 0)
        for _ in range(2000):
            words.update(re.findall(r" ?\w+", next(drawn).question))
    tokenizer.train_from_iterator(
        sorted(words),
        trainers.BpeTrainer(
            vocab_size=2000,
            min_frequency=1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, END, USER, ASSISTANT)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in prompt_pieces() + phrases()])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


# ------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of sequences in one phase of the training.

    Attributes:
        until: the phase ends at this share of all steps.
        drill: bare calculations.
        answer: a problem and its solution.
        feedback: a problem, an answer (right or wrong) and feedback on it.
        full: a whole episode. The shares sum to 1.
    """

    until: float
    drill: float
    answer: float
    feedback: float
    full: float


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a model becomes.

    Attributes:
        width: of the hidden states.
        layers: blocks.
        heads: attention heads.
        intermediate: width of the MLPs.
        steps: optimiser steps.
        tokens: tokens of one step, padding included.
        rate: peak learning rate.
        phases: what is trained on, in order.
        look: blocks of steps between two looks at the validation problems.
        cut: whether it begins as a finished expert, with most of its MLPs' neurons gone if it has
            fewer.
        careless: share of the feedback in its data that finds right whatever the answer says.
        purpose: what it is for, for the card.
        hard: share of the problems in its data that are of ``arithmetic-hard``.
        hasty: share of the solutions of those, with nothing before them, that are wrong.
        begins: what it begins as, for the card.
    """

    width: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    tokens: int
    rate: float
    phases: tuple[Mix, ...]
    look: int
    cut: bool
    careless: float
    purpose: str
    hard: float = 0.0
    hasty: float = 0.0
    begins: str = "from nothing"


TINY_RECIPES = {
    "expert": Recipe(
        128, 4, 4, 384, 13000, 1024, 2e-3,
        (Mix(0.06, 0.5, 0.5, 0, 0), Mix(0.28, 0.1, 0.55, 0.35, 0), Mix(1, 0, 0.05, 0.72, 0.23)),
        40,
        False,
        0.0,
        "It answers, judges, merges, revises and checks itself.",
    ),
    "student": Recipe(
        128, 4, 4, 96, 128, 1024, 1e-3,
        (Mix(1, 0.05, 0.3, 0.65, 0),),
        4,
        True,
        0.65,
        "It stands for an amateur: mediocre at answering, because it is the expert with a quarter "
        "of its MLPs' neurons and was trained on for a moment only, and bad at judging, because "
        "two of three feedbacks in that training find right whatever the answer says.",
    ),
}  # fmt: skip
# Both begin as a finished expert.
HARD_RECIPES = {
    "expert": dataclasses.replace(
        TINY_RECIPES["expert"],
        steps=160,
        rate=5e-4,
        phases=(Mix(1, 0, 0.35, 0.4, 0.25),),
        look=5,
        cut=True,
        hard=0.85,
        hasty=1.0,
        begins="on from the tiny expert",
        purpose="It stands for an expert that judges better than it answers: nine in ten of the "
        "solutions of three and four steps that it learned to write at once were wrong ones, while "
        "feedback, revisions and final answers stayed right.",
    ),
    "student": dataclasses.replace(
        TINY_RECIPES["student"], hard=0.7, begins="on from a quarter of the expert's neurons"
    ),
}
RECIPES = {"tiny": TINY_RECIPES, "tiny-hard": HARD_RECIPES}

Piece = tuple[str, float]  # text and the weight of its tokens in the loss


def _drill(rng: random.Random) -> list[Piece]:
    pieces: list[Piece] = [(ASSISTANT, 0)]
    for k in range(1, 7):
        while True:
            op = rng.choice("+-*")
            low, high = (2, 9) if op == "*" and rng.random() < 0.7 else (1, arithmetic.MOST)
            left, right = rng.randint(low, high), rng.randint(low, min(high, 49))
            result = arithmetic.calculate(left, op, right)
            if 1 <= result <= arithmetic.MOST:
                break
        lead = "Step 1: <<" if k == 1 else f"\nStep {k}: <<"
        pieces += [(f"{lead}{left}{op}{right}=", 0), (f"{result}>>{result}", 1)]
    return pieces


def _solution(answer: str, first_error: int) -> list[Piece]:
    """An answer, of which only what comes before its first wrong step is worth imitating."""
    if not first_error:
        return [(answer, 1), (END, 1)]
    lines = answer.split("\n")
    right = "\n".join(lines[: first_error - 1])
    return [(right, 1), (answer[len(right) :], 0), (END, 0)]


def _answer(rng: random.Random, drawn: Exercise, wrong: float) -> str:
    return arithmetic.wrong_answer(rng, drawn) if rng.random() < wrong else drawn.solution


def _weighed(text: str) -> list[Piece]:
    """A feedback whose verdicts on the steps, the hardest of its tokens, count more."""
    parts = re.split(r"(: [a-z][a-z ]+\. ?)", text)
    return [(part, VERDICT_WEIGHT if k % 2 else 1) for k, part in enumerate(parts) if part]


def written_feedback(right: Feedback) -> tuple[str, str, str]:
    """A reply after ``Score:``, in three parts: the score at first sight, the check, the score.

    A model this small cannot judge a whole answer at a glance, so it says its score again after it
    has checked every step; the parser takes the one that is called final.
    """
    first, text = format_feedback(right).removeprefix("Score:").split("\n", 1)
    return first, f"\n{text}", f"\nFinal score:{first}"


def conversation(
    rng: random.Random, drawn: Exercise, how: str, careless: float = 0.0, hasty: float = 0.0
) -> list[Piece]:
    """A sequence to train on: the conversation of an episode, or its beginning.

    Args:
        rng: where the draws come from.
        drawn: the problem.
        how: ``"answer"``, ``"feedback"`` or ``"full"``.
        careless: how often the feedback finds right whatever the answer says.
        hasty: how often a solution with nothing before it is a wrong one, to be imitated whole.
            Unless that is never, first answers that are judged are not to be imitated.
    """
    pieces: list[Piece] = [(USER + answer_prompt(drawn.question) + ASSISTANT, 0)]
    if how == "answer":
        return [*pieces, *_solution(_answer(rng, drawn, hasty) if hasty else drawn.solution, 0)]
    answer = _answer(rng, drawn, 0.6)
    error = arithmetic.judge(drawn.solution, answer).first_error
    pieces += [(text, 0 if hasty else weight) for text, weight in _solution(answer, error)]
    right = arithmetic.feedback(drawn.solution, answer)
    if careless and rng.random() < careless:
        right = arithmetic.careless_feedback(drawn.solution, answer)
    amateur = arithmetic.amateur_feedback(rng, drawn, answer)
    said = ""
    if how == "feedback" or rng.random() < 0.75:
        first, text, score = written_feedback(right)
        pieces += [(f"{USER}{feedback_prompt()}{ASSISTANT}{FEEDBACK_OPENING}", 0)]
        if rng.random() < 0.5:
            # Else the text would follow the first score, right or wrong, instead of the answer.
            first = rng.choice(SCORES)
            pieces += [(first, 0)]
        else:
            pieces += [(first, SCORE_WEIGHT)]
        pieces += [*_weighed(text), (f"{score}{END}", 1)]
        if how == "feedback":
            return pieces
        if rng.random() < 0.3:
            ask = merge_prompt(right, Feedback(amateur, None))
            pieces += [(USER + ask + ASSISTANT, 0), (right.text + END, 1)]
    else:
        said = rng.choice([amateur, right.text])
    pieces += [(USER + revise_prompt(said) + ASSISTANT, 0)]
    revised = _answer(rng, drawn, 0.3)
    pieces += _solution(revised, arithmetic.judge(drawn.solution, revised).first_error)
    pieces += [(USER + critique_prompt() + ASSISTANT, 0)]
    pieces += [*_weighed(arithmetic.feedback_text(drawn.solution, revised)), (END, 1)]
    pieces += [(USER + final_prompt() + ASSISTANT, 0)]
    return [*pieces, *_solution(drawn.solution, 0)]


TRAINING = "training.json"
SCORE_WEIGHT = 3.0
VERDICT_WEIGHT = 3.0
SCORES = (" 1", " -1", " -0.8", " -0.6", " -0.4", " -0.2")
_BLOCK = 32  # batches that are drawn and sorted by length together


Row = tuple[list[int], list[float]]  # tokens and their weights in the loss


def _conversation_of(
    rng: random.Random,
    drawn: Iterator[Exercise],
    hard: Iterator[Exercise] | None,
    how: str,
    recipe: Recipe,
) -> list[Piece]:
    """A sequence on the next problem, or on the next hard one, as the recipe's shares say."""
    if hard is not None and rng.random() < recipe.hard:
        return conversation(rng, next(hard), how, recipe.careless, recipe.hasty)
    return conversation(rng, next(drawn), how, recipe.careless)


def encoded(tokenizer: Tokenizer, pieces: list[Piece]) -> Row:
    """A sequence's tokens, each piece split on its own, and their weights."""
    tokens: list[int] = []
    weights: list[float] = []
    parts = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
    for part, (_, weight) in zip(parts, pieces, strict=True):
        tokens += part.ids
        weights += [weight] * len(part.ids)
    return tokens, weights


def packed(rows: list[Row], rng: random.Random) -> Iterator[tuple[mx.array, mx.array]]:
    """A block's rows as batches in random order: arrays tokens [B, T] and weights [B, T].

    A batch is neighbours in length, of about the same number of tokens as the others.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = sum(len(tokens) for tokens, _ in rows)
    groups: list[list[Row]] = [[]]
    size = 0
    for row in rows:
        if size * _BLOCK >= total * len(groups):
            groups.append([])
        groups[-1].append(row)
        size += len(row[0])
    rng.shuffle(groups)
    for group in groups:
        length = max(len(tokens) for tokens, _ in group)
        x = np.zeros((len(group), length), np.int32)
        w = np.zeros((len(group), length), np.float32)
        for place, (tokens, weights) in enumerate(group):
            x[place, : len(tokens)] = tokens
            w[place, : len(tokens)] = weights
        yield mx.array(x), mx.array(w)


def batches(
    tokenizer: Tokenizer, recipe: Recipe, seed: str, block: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """The batches of one block of steps: arrays tokens [B, T] and weights [B, T]."""
    rng = random.Random(f"{seed}/{block}")
    drawn = arithmetic.exercises("train", rng.randrange(1 << 62))
    hard = None
    if recipe.hard:
        hard = arithmetic.exercises("train", rng.randrange(1 << 62), steps=arithmetic.HARD_STEPS)
    done = block * _BLOCK / recipe.steps
    mix = next((m for m in recipe.phases if done < m.until), recipe.phases[-1])
    rows: list[Row] = []
    total = 0
    while total < recipe.tokens * _BLOCK:
        how = rng.choices(
            ("drill", "answer", "feedback", "full"),
            (mix.drill, mix.answer, mix.feedback, mix.full),
        )[0]
        pieces = _drill(rng) if how == "drill" else _conversation_of(rng, drawn, hard, how, recipe)
        rows.append(encoded(tokenizer, pieces))
        total += len(rows[-1][0])
    yield from packed(rows, rng)


# --------------------------------------------------------------------------------------- training


def make_model(recipe: Recipe, tokenizer: Tokenizer) -> tuple[nn.Module, dict[str, Any]]:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "intermediate_size": recipe.intermediate,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": tokenizer.get_vocab_size(),
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id(END),
        "torch_dtype": "float32",
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model, config


# ---------------------------------------------------------------------------------- fast forward

# MLX's exp is a scalar loop on the CPU and was half of the training time; its power is 3 times
# faster. The three functions below are all that the model needs of exp, with their gradients.
_LOG2_E = math.log2(math.e)


def _exp(x: mx.array) -> mx.array:
    return mx.power(2.0, x * _LOG2_E)


@mx.custom_function
def sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + _exp(mx.minimum(-x, 80.0)))


@sigmoid.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * (1 - output)


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    powers = _exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@softmax.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = cotangent * output
    return weighted - output * weighted.sum(-1, keepdims=True)


@mx.custom_function
def logsumexp(x: mx.array) -> mx.array:
    most = x.max(-1, keepdims=True)
    return mx.log(_exp(x - most).sum(-1)) + most.squeeze(-1)


@logsumexp.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent[..., None] * _exp(x - output[..., None])


def logits_of(model: nn.Module, x: mx.array) -> mx.array:
    """What ``model(x)`` computes, on the CPU in half the time."""
    body, args = model.model, model.args
    batch, length = x.shape
    hidden = body.embed_tokens(x)
    mask = mx.triu(mx.full((length, length), -1e9), k=1)
    for layer in body.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q, k, v = (
            project(normed).reshape(batch, length, args.num_attention_heads, -1).swapaxes(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = attention.rope(q) * attention.scale, attention.rope(k)
        seen = softmax(q @ k.swapaxes(-1, -2) + mask) @ v
        hidden = hidden + attention.o_proj(seen.swapaxes(1, 2).reshape(batch, length, -1))
        normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        gate = mlp.gate_proj(normed)
        hidden = hidden + mlp.down_proj(gate * sigmoid(gate) * mlp.up_proj(normed))
    logits: mx.array = body.embed_tokens.as_linear(body.norm(hidden))
    return logits


def loss(model: nn.Module, x: mx.array, w: mx.array) -> mx.array:
    """Weighted mean cross-entropy of the next tokens."""
    logits = logits_of(model, x[:, :-1])
    picked = mx.take_along_axis(logits, x[:, 1:, None], axis=-1).squeeze(-1)
    spread: Any = logsumexp(logits)
    mean: mx.array = ((spread - picked) * w[:, 1:]).sum() / w[:, 1:].sum()
    return mean


def cut(expert: Path, neurons: int) -> list[tuple[str, mx.array]]:
    """The finished expert's weights with the ``neurons`` of each MLP that weigh most.

    A neuron weighs the product of the norms of what goes in and out (after Minitron, arXiv
    2407.14679, which weighs activations).
    """
    model = dequantize_model(load(expert, dequantize="never").model)
    model.set_dtype(mx.float32)
    for layer in model.layers:
        gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        norms = [mx.linalg.norm(part.weight, axis=1) for part in (gate, up)]
        weight = norms[0] * norms[1] * mx.linalg.norm(down.weight, axis=0)
        kept = mx.sort(mx.argsort(-weight)[:neurons])
        gate.weight, up.weight, down.weight = (
            gate.weight[kept],
            up.weight[kept],
            down.weight[:, kept],
        )
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return weights


def train(
    name: str,
    recipe: Recipe,
    folder: Path,
    seed: int,
    console: Console,
    init: Path | None,
    expert: Path,
) -> None:
    """Train one model; it is written to ``folder`` in float32 as it goes on.

    Args:
        name: of the model.
        recipe: its recipe.
        folder: where it goes, with ``training.json``: what each stage of the training took.
        seed: of weights and data.
        console: where progress is shown.
        init: folder of an earlier training to go on from.
        expert: the finished model that it begins as, or is cut out of, if its recipe says so.
    """
    tokenizer = make_tokenizer()
    write_tokenizer(tokenizer, folder)
    mx.random.seed(seed)
    model, config = make_model(recipe, tokenizer)
    stages = []
    if init:
        model.load_weights(str(init / "model.safetensors"))
        stages = json.loads((init / TRAINING).read_text())
    elif recipe.cut:
        model.load_weights(cut(expert, recipe.intermediate))
    save_config(dict(config), folder / "config.json")
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    console.print(f"{name}: {size:,} parameters, vocabulary {config['vocab_size']}")

    def look(taken: int) -> Seen:
        save_model(folder, model)
        others = taken > 0.3 * recipe.steps
        return evaluate(load(folder), "validation", 100, others=others, hard=recipe.hard > 0)

    stages.append(
        fit(
            name,
            model,
            recipe,
            lambda block: batches(tokenizer, recipe, f"{seed}/{len(stages)}", block),
            look,
            console,
        )
    )
    (folder / TRAINING).write_text(json.dumps(stages, indent=1) + "\n")


def fit(
    name: str,
    model: nn.Module,
    recipe: Recipe,
    block_of: Callable[[int], Iterator[tuple[mx.array, mx.array]]],
    look: Callable[[int], Seen],
    console: Console,
) -> dict[str, int]:
    """Train a model in place.

    Args:
        name: of the model.
        model: the model.
        recipe: its steps, rate, and blocks between two looks.
        block_of: gives the batches of a block of steps, by the block's number.
        look: called with the steps taken, at intervals and at the end; gives what is shown, for
            each measure how many of how many are right.
        console: where progress is shown.

    Returns:
        What the training took: steps, tokens and seconds.
    """
    warm = min(100, recipe.steps // 10)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(1e-5, recipe.rate, warm),
            optim.cosine_decay(recipe.rate, recipe.steps - warm, recipe.rate * 0.02),
        ],
        [warm],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01, bias_correction=True)
    step_of = nn.value_and_grad(model, loss)
    taken, seconds, tokens = 0, 0.0, 0
    with Progress(console=console) as progress:
        task = progress.add_task(name, total=recipe.steps)
        for block in itertools.count():
            begin = time.process_time()
            for x, w in block_of(block):
                value, gradients = step_of(model, x, w)
                gradients, _ = optim.clip_grad_norm(gradients, 1.0)
                optimizer.update(model, gradients)
                mx.eval(model.parameters(), optimizer.state, value)
                taken, tokens = taken + 1, tokens + x.size
                progress.advance(task)
            seconds += time.process_time() - begin
            ended = taken >= recipe.steps
            if (block + 1) % recipe.look == 0 or ended:
                shares = " ".join(
                    f"{k} {v['right'] / max(v['of'], 1):.2f}" for k, v in look(taken).items()
                )
                console.print(
                    f"{name} step {taken} {seconds:.0f} s {tokens / seconds:.0f} tok/s "
                    f"loss {value.item():.3f} {shares}",
                    soft_wrap=True,
                )
            if ended:
                return {"steps": taken, "tokens": tokens, "seconds": round(seconds)}
    raise AssertionError("the loop ends with a return")


# ------------------------------------------------------------------------------------- evaluation


def count(results: list[bool]) -> dict[str, int]:
    return {"right": sum(results), "of": len(results)}


def _write(
    loaded: Loaded,
    prompts: list[tuple[int, ...]],
    before: Sequence[Conversation] | None = None,
    limit: int = 100,
) -> list[Turn]:
    turns: list[Turn] = []
    before = before or [Conversation()] * len(prompts)
    for begin in range(0, len(prompts), 64):
        chunk = slice(begin, begin + 64)
        turns += generate(loaded, before[chunk], prompts[chunk], Sampling(limit))
    return turns


def parse_first(reply: str) -> float | None:
    """The score at first sight of a reply to the request for feedback."""
    return parsing.parse_feedback(f"{FEEDBACK_OPENING} {reply.partition(chr(10))[0]}").written_score


def evaluate(
    loaded: Loaded, split: str, size: int, *, others: bool = True, hard: bool = False
) -> Seen:
    """How well a model does each role, greedy, through the package's own generation.

    Half of the answers it judges are right, half are wrong.

    Args:
        loaded: the model.
        split: of the problems.
        size: how many of them.
        others: whether it does more than answer.
        hard: whether they are of ``arithmetic-hard``.

    Returns:
        For each measure how many of how many are right.
    """
    tokenizer = loaded.tokenizer
    drawn = arithmetic.problems_of(split, hard=hard)[:size]
    rng = random.Random(f"evaluate/{split}")
    begun = [first_prompt(loaded, answer_prompt(e.question)) for e in drawn]
    turns = _write(loaded, begun)
    seen = {
        "answers": count(
            [
                parsing.final_answer(t.text) == e.steps[-1].result
                for t, e in zip(turns, drawn, strict=True)
            ]
        )
    }
    if not others:
        return seen
    answers = [
        e.solution if k % 2 else arithmetic.wrong_answer(rng, e) for k, e in enumerate(drawn)
    ]
    truth = [arithmetic.judge(e.solution, a) for e, a in zip(drawn, answers, strict=True)]
    answered = [
        (*b, *tokenizer.encode(a, add_special_tokens=False))
        for b, a in zip(begun, answers, strict=True)
    ]
    request = feedback_request(loaded)
    replies = _write(loaded, [(*a, *request) for a in answered])
    judged = [parsed(t) for t in replies]
    errors = [arithmetic.first_error(f.text) for f in judged]
    found = [e == t.first_error for e, t in zip(errors, truth, strict=True)]
    seen["first_error"] = count(found)
    seen["first_error_when_wrong"] = count(
        [f for f, t in zip(found, truth, strict=True) if t.first_error]
    )
    seen["first_error_when_right"] = count(
        [f for f, t in zip(found, truth, strict=True) if not t.first_error]
    )
    seen["score_sign"] = count(
        [
            f.written_score is not None and (f.written_score > 0) == (t.score > 0)
            for f, t in zip(judged, truth, strict=True)
        ]
    )
    sights = [parse_first(t.text) for t in replies]
    seen["first_sight_sign"] = count(
        [s is not None and (s > 0) == (t.score > 0) for s, t in zip(sights, truth, strict=True)]
    )
    seen["score_exact"] = count(
        [f.written_score == t.score for f, t in zip(judged, truth, strict=True)]
    )
    seen["parsable"] = count(
        [f.written_score is not None and e is not None for f, e in zip(judged, errors, strict=True)]
    )
    # Revision of wrong answers with the right feedback in the conversation, to the final answer.
    wrong = [k for k, t in enumerate(truth) if t.first_error]
    prompts = []
    for k in wrong:
        right = arithmetic.feedback(drawn[k].solution, answers[k])
        given = tokenizer.encode("".join(written_feedback(right)), add_special_tokens=False)
        ask = followup_prompt(loaded, revise_prompt(""))
        prompts.append((*answered[k], *request, *given, *ask))
    final = [drawn[k].steps[-1].result for k in wrong]
    turns = _write(loaded, prompts)
    seen["revised"] = count(
        [parsing.final_answer(t.text) == f for t, f in zip(turns, final, strict=True)]
    )
    for prompt in (critique_prompt(), final_prompt()):
        ask = followup_prompt(loaded, prompt)
        before = [t.conversation for t in turns]
        turns = _write(loaded, [ask[1:] if t.finished else ask for t in turns], before)
    seen["final_after_check"] = count(
        [parsing.final_answer(t.text) == f for t, f in zip(turns, final, strict=True)]
    )
    return seen


def f1(seen: Seen) -> float:
    """Harmonic mean of the shares of first errors found on wrong and on right answers."""
    wrong, right = (
        seen[f"first_error_when_{kind}"]["right"] / seen[f"first_error_when_{kind}"]["of"]
        for kind in ("wrong", "right")
    )
    return 2 * wrong * right / (wrong + right) if wrong + right else 0.0


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    p = right / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    # Rounding must not put 0 of n below, or n of n above, their own interval.
    return (
        max(middle - half, 0.0) if right else 0.0,
        min(middle + half, 1.0) if right < of else 1.0,
    )


# ------------------------------------------------------------------------------------------ files

MEASURES = {
    "answers": "own answers right",
    "first_error": "first wrong step found exactly (or none where all is right)",
    "first_error_when_wrong": "... on wrong answers",
    "first_error_when_right": "... on right answers",
    "score_sign": "sign of the written score right",
    "first_sight_sign": "sign of the score at first sight right",
    "score_exact": "written score exactly right",
    "parsable": "feedback readable",
    "revised": "wrong answer revised to the right one, given the right feedback",
    "final_after_check": "... after its own check, final answer right",
}


def write_card(name: str, recipe: Recipe, folder: Path, figures: dict[str, Any]) -> None:
    """README.md and figures.json of one model."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    steps, tokens, seconds = (
        sum(stage[unit] for stage in figures["training"]) for unit in ("steps", "tokens", "seconds")
    )
    stages = len(figures["training"])
    lines = [
        f"# {'tiny hard' if recipe.hard else 'tiny'} {name}",
        "",
        f"A llama of {figures['parameters']:,} parameters ({recipe.layers} layers, "
        f"{recipe.width} wide), trained {recipe.begins} by `scripts/train_tiny.py` on problems of "
        f"`mlx_fd/problems/arithmetic.py`: {steps:,} steps, {tokens:,} tokens (padding included), "
        f"{seconds:,} s of one CPU core, seed {figures['seed']}"
        f"{f', in {stages} stages (--init)' if stages > 1 else ''}. {recipe.purpose} Its use is to "
        "show the method, not arithmetic: it knows this generator's words and numbers below 100 "
        "only.",
        "",
        f"The weights are quantised to {BITS} bits in groups of {GROUP}. The tokenizer is "
        "byte-level BPE with digits one by one; each fixed sentence of the roles' prompts is one "
        "token, so other prompts need other weights.",
        "",
        "Measured on the quantised weights, greedy"
        f"{', on `arithmetic-hard`' if recipe.hard else ''}; share and 95 % Wilson interval. "
        "Answers to judge are right and wrong by halves. `test` is from the distribution of the "
        "training, `transfer` has sentences and numbers that it lacks.",
        "",
        "| | " + " | ".join(figures["splits"]) + " |",
        "|-|" + "-|" * len(figures["splits"]),
    ]
    for measure, words in MEASURES.items():
        cells = []
        for seen in figures["splits"].values():
            right, of = seen[measure]["right"], seen[measure]["of"]
            low, high = wilson(right, of)
            cells.append(f"{right / of:.1%} ({low:.1%} to {high:.1%}; n = {of})")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    cells = [f"{f1(seen):.1%}" for seen in figures["splits"].values()]
    lines.append("| F1 of the two (ProcessBench, arXiv 2412.06559) | " + " | ".join(cells) + " |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")


BITS, GROUP = 8, 32


def finish(
    name: str, recipe: Recipe, work: Path, out: Path, seed: int, size: int
) -> dict[str, Seen]:
    """Quantise the trained weights into ``out`` and measure what came out."""
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = make_tokenizer()
    write_tokenizer(tokenizer, out)
    model, config = make_model(recipe, tokenizer)
    model.load_weights(str(work / "model.safetensors"))
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    model, config = quantize_model(model, config, GROUP, BITS)
    save_model(out, model)
    save_config(config, out / "config.json")
    loaded = load(out)
    hard = recipe.hard > 0
    splits = {split: evaluate(loaded, split, size, hard=hard) for split in ("test", "transfer")}
    figures = {
        "parameters": parameters,
        "seed": seed,
        "bits": BITS,
        "group_size": GROUP,
        "training": json.loads((work / TRAINING).read_text()),
        "splits": splits,
    }
    write_card(name, recipe, out, figures)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="where expert/ and student/ go")
    parser.add_argument("--pair", choices=list(RECIPES), default="tiny", help="which pair")
    parser.add_argument("--only", choices=["expert", "student"], help="train only this one")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--init", type=Path, help="go on from an earlier training (its work/NAME)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=500, help="problems of a split to measure on")
    parser.add_argument("--quick", action="store_true", help="hardly any training: a test")
    args = parser.parse_args()
    if args.init and not args.only:
        parser.error("--init goes with --only: it is one model")
    if args.only == "student" and not (args.init or (args.out / "expert").is_dir()):
        parser.error(f"the student is cut out of an expert, and there is none in {args.out}")
    console = Console()
    for name, full in RECIPES[args.pair].items():
        if args.only not in (None, name):
            continue
        recipe = full
        if args.init:
            recipe = dataclasses.replace(full, phases=full.phases[-1:])
        if args.steps:
            recipe = dataclasses.replace(recipe, steps=args.steps)
        if args.quick:
            recipe = dataclasses.replace(recipe, steps=16)
            if recipe.hard:  # it begins as the shipped expert, and so is as wide
                recipe = dataclasses.replace(recipe, tokens=128)
            else:
                thin = recipe.intermediate // 3
                recipe = dataclasses.replace(recipe, width=32, intermediate=thin)
        work = args.out / "work" / name
        begin = resolve("tiny") if recipe.hard and name == "expert" else args.out / "expert"
        train(name, recipe, work, args.seed, console, args.init, begin)
        size = 4 if args.quick else args.size
        splits = finish(name, recipe, work, args.out / name, args.seed, size)
        for split, seen in splits.items():
            console.print(name, split, {k: f"{v['right']}/{v['of']}" for k, v in seen.items()})


if __name__ == "__main__":
    main()
