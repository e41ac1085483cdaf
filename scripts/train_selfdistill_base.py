"""Train the base of the self-distillation bench: a model that can use each context.

python scripts/train_selfdistill_base.py --out DIR            # minutes of one core
python scripts/train_selfdistill_base.py --out DIR --quick    # hardly any training: a test
python scripts/train_selfdistill_base.py --out DIR --misread 0.85 --steps 768   # see below

It begins as the tiny expert with most of its MLPs' neurons gone, as the tiny student does. Then it
reads solutions of which most are wrong, so that it solves problems as mediocre as its reading; and
problems with a context (`mlx_fd/training/selfdistill/contexts`), after which the solution is
right. So it answers better with a context than without: what self-distillation is made of. It
judges answers too, which the bench takes as the other task, the one that may be forgotten.

With `--misread` its errors are no accidents: in the solutions that it reads without a context each
product is taken for a sum (doubled for two more, 3 bags of 5 for 8), in that share of the problems
that have one. So its likeliest answer is wrong, and sampling less wildly is no help. Contexts say
how it is, and a quarter of them the misreading; the solution after them is the one that they say.
"""

import argparse
import dataclasses
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_config, save_model
from rich.console import Console
from tokenizers import AddedToken, Tokenizer
from train_tiny import (
    _BLOCK,
    ASSISTANT,
    BITS,
    END,
    GROUP,
    TRAINING,
    USER,
    Piece,
    Recipe,
    Row,
    Seen,
    conversation,
    count,
    cut,
    encoded,
    fit,
    make_model,
    make_tokenizer,
    packed,
    wilson,
    write_tokenizer,
)

from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems import Problem, arithmetic, parsing
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.selfdistill import noise
from mlx_fd.training.selfdistill.contexts import (
    CONTEXTS,
    Attempt,
    Materials,
    contrast,
    demonstration,
    feedback,
    reference,
    reflection,
    rubric,
    sibling,
    step_critique,
)
from mlx_fd.training.selfdistill.playbook import Playbook

RECIPE = Recipe(
    128, 4, 4, 96, 1000, 1024, 1.5e-3, (), 10, True, 0.0,
    "It is the base of the self-distillation bench: mediocre at answering, because most of the "
    "solutions that it learned from without a context are wrong, and good at using a context.",
)  # fmt: skip
MISREADS = (
    "It takes products for sums: in a share of the solutions that it learned from without a "
    "context each product is misread. With a context it reads what that says."
)
# Shares of the sequences: bare answers, answers with a context; the others are feedback.
BARE, WITH_CONTEXT = 0.15, 0.7
# The same where products are misread, and how many contexts say what is misread.
MISREAD_BARE, MISREAD_WITH_CONTEXT, SAY_THE_MISREADING = 0.45, 0.45, 0.25
# How many of the solutions without a context are wrong, by the number of steps.
WRONG = {1: 0.6, 2: 0.75, 3: 0.85, 4: 0.95}
NOISY = 0.2
FOLLOWS_A_WRONG_HINT = 0.8
OWN_STYLE = "reference, in the attempt's style"
TAUGHT = tuple(name for name in CONTEXTS if name not in ("none", "clean"))
# The contexts that leave something to work out are seen more often than those to copy from.
SHARES = [2 if name in ("reference", "feedback", "rubric", "reflection") else 1 for name in TAUGHT]


# -------------------------------------------------------------------------------------- tokenizer


def context_pieces() -> list[str]:
    """The fixed pieces of the contexts' messages, and what is often quoted in them."""
    one, two, three = "\u241fone\u241f", "\u241ftwo\u241f", "\u241fthree\u241f"
    asked = Problem("", one, "", "")
    messages = [
        reference.reference_message(asked, two),
        step_critique.critique_message(asked, two),
        feedback.feedback_message(asked, two),
        rubric.rubric_message(asked, two),
        demonstration.demonstration_message(asked, two),
        contrast.hint_message(asked, two),
        sibling.sibling_message(asked, two),
        reflection.reflection_message(asked, [two], one, two, three),
    ]
    pieces = [
        piece
        for message in messages
        for piece in message.replace(two, one).replace(three, one).split(one)
    ]
    rubrics = {
        line
        for drawn, _ in zip(arithmetic.exercises("train", 0), range(200), strict=False)
        for line in rubric.rubric(_problem(drawn)).split("\n")
    }
    prose = [" plus ", " minus ", " times ", " is ", ". ", "So the answer is "]
    lessons = reflection.lessons()
    return list(dict.fromkeys([*pieces, *lessons, *sorted(rubrics), *prose]))


def base_tokenizer() -> Tokenizer:
    """The tiny pair's tokenizer, its tokens where they were, and one for each piece."""
    tokenizer = make_tokenizer()
    known = tokenizer.get_vocab()
    spoken = {f" {word}" for n in range(100) for word in noise.spoken(n).split()}
    fresh = [*context_pieces(), *sorted(spoken)]
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in fresh if t.strip() and t not in known]
    )
    return tokenizer


def widened(
    weights: list[tuple[str, mx.array]], old: Tokenizer, new: Tokenizer
) -> list[tuple[str, mx.array]]:
    """Weights with embeddings for the new tokens: the mean of what they were split into before."""
    name = "model.embed_tokens.weight"
    table = dict(weights)
    rows = [table[name]]
    for token in range(old.get_vocab_size(), new.get_vocab_size()):
        parts = old.encode(new.id_to_token(token), add_special_tokens=False).ids
        rows.append(table[name][mx.array(parts)].mean(0, keepdims=True))
    table[name] = mx.concatenate(rows)
    return list(table.items())


# ------------------------------------------------------------------------------------------- data


def _problem(drawn: arithmetic.Exercise) -> Problem:
    return Problem(drawn.question, drawn.question, drawn.solution, str(drawn.steps[-1].result))


def _attempt(problem: Problem, text: str, question: str = "") -> Attempt:
    final = read_final(text, problem)
    right = is_right(final, problem)
    return Attempt(problem, question or problem.question, (), text, final, right)


def misread(drawn: arithmetic.Exercise) -> arithmetic.Exercise | None:
    """A problem as one reads it who takes each product for a sum.

    ``None``: it has no product, or its numbers would leave the range of 1 to 99.
    """
    steps: list[arithmetic.Step] = []
    value = drawn.start
    for event in drawn.events:
        operands = [(value, event.op, event.first)]
        if event.op == "*":
            operands = [(value, "+", event.first)]
        elif event.op == "g":
            operands = [(event.first, "+", event.second), (value, "+", event.first + event.second)]
        for left, op, right in operands:
            value = arithmetic.calculate(left, op, right)
            steps.append(arithmetic.Step(left, op, right, value))
    in_range = all(1 <= step.result <= arithmetic.MOST for step in steps)
    read = tuple(steps)
    return dataclasses.replace(drawn, steps=read) if in_range and read != drawn.steps else None


def context_sequence(
    rng: random.Random, drawn: arithmetic.Exercise, misreading: bool = False
) -> list[Piece]:
    """A problem with a context, and the right solution; or a hint's own, where it is wrong.

    With ``misreading`` attempts are wrong as a misread problem's are, and some contexts say so too.
    """
    other = misread(drawn) if misreading else None
    wrong_text = arithmetic.wrong_answer(rng, drawn)
    if other is not None and rng.random() < SAY_THE_MISREADING:
        drawn, wrong_text = other, drawn.solution
    elif other is not None and rng.random() < 0.7:
        wrong_text = other.solution
    problem = _problem(drawn)
    (name,) = rng.choices(TAUGHT, SHARES)
    wrong = _attempt(problem, wrong_text)
    own = wrong if rng.random() < 0.7 or name == "reflection" else _attempt(problem, drawn.solution)
    siblings = [_attempt(problem, drawn.solution)]
    if name == "contrast":
        siblings.append(_attempt(problem, wrong_text))
    lessons = rng.sample(reflection.lessons(), rng.randint(0, 4))
    playbook = Playbook().after(lessons, {})
    if rng.random() < 0.3:
        playbook = playbook.after([], {problem.id: drawn.solution})
    style = rng.choice(["prose", "solution"]) if misreading else "prose"
    materials = Materials(truth=True, reference_style=style, playbook=playbook)
    view = CONTEXTS[name].views([own, *siblings], materials)[0]
    message, solution = view.teacher, drawn.solution
    if view.wrong and rng.random() < 0.5:
        message = view.wrong[0]
        hint = next(a.text for a in siblings if not a.correct)
        solution = hint if rng.random() < FOLLOWS_A_WRONG_HINT else solution
    return [(USER + (message or view.student) + ASSISTANT, 0), (solution, 1), (END, 1)]


def bare_sequence(
    rng: random.Random, drawn: arithmetic.Exercise, share: float = 0.0
) -> list[Piece]:
    """A problem, sometimes with noise on it, and a solution, most often a wrong one.

    With a share of misread problems: that share of those that can be misread is, all others right.
    """
    question = drawn.question
    if rng.random() < NOISY:
        kind, level = rng.choice(noise.KINDS), rng.uniform(0, 0.4)
        question = noise.noisy(question, kind, level, rng.randrange(1 << 30))
    if share:
        other = misread(drawn) if rng.random() < share else None
        solution = (other or drawn).solution
    else:
        is_wrong = rng.random() < WRONG[len(drawn.steps)]
        solution = arithmetic.wrong_answer(rng, drawn) if is_wrong else drawn.solution
    return [(USER + answer_prompt(question) + ASSISTANT, 0), (solution, 1), (END, 1)]


def batches(
    tokenizer: Tokenizer, recipe: Recipe, seed: str, block: int, share: float = 0.0
) -> Iterator[tuple[mx.array, mx.array]]:
    """The batches of one block of steps; ``share`` is that of :func:`bare_sequence`."""
    bare, with_context = (MISREAD_BARE, MISREAD_WITH_CONTEXT) if share else (BARE, WITH_CONTEXT)
    rng = random.Random(f"base/{seed}/{block}")
    drawn = arithmetic.exercises("train", rng.randrange(1 << 62))
    rows: list[Row] = []
    total = 0
    while total < recipe.tokens * _BLOCK:
        kind = rng.random()
        if kind < bare:
            pieces = bare_sequence(rng, next(drawn), share)
        elif kind < bare + with_context:
            pieces = context_sequence(rng, next(drawn), share > 0)
        else:
            # The answers judged stand where bare ones do: where those are misread, not to imitate.
            pieces = conversation(rng, next(drawn), "feedback", hasty=float(share > 0))
        rows.append(encoded(tokenizer, pieces))
        total += len(rows[-1][0])
    yield from packed(rows, rng)


# ------------------------------------------------------------------------------------- evaluation


def evaluate(
    loaded: Loaded, split: str, size: int, temperature: float = 1.0, misreading: bool = False
) -> Seen:
    """Answers without a context and with each, sampled: how many of how many are right.

    The contexts are made of wrong attempts as the generator writes them, and of the truth. With
    ``misreading`` the attempt is the misread problem's where there is one.
    """
    drawn = arithmetic.problems_of(split)[:size]
    rng = random.Random(f"base/{split}")
    groups = []
    for exercise in drawn:
        problem = _problem(exercise)
        other = misread(exercise) if misreading else None
        groups.append(
            [
                _attempt(
                    problem, other.solution if other else arithmetic.wrong_answer(rng, exercise)
                ),
                _attempt(problem, exercise.solution),
                _attempt(problem, arithmetic.wrong_answer(rng, exercise)),
            ]
        )
    seen = {}
    for label in ("none", *TAUGHT, *([OWN_STYLE] if misreading else [])):
        name, style = ("reference", "solution") if label == OWN_STYLE else (label, "prose")
        materials = Materials(truth=True, reference_style=style)
        views = [CONTEXTS[name].views(group, materials)[0] for group in groups]
        prompts = [first_prompt(loaded, view.teacher or view.student) for view in views]
        right = []
        for begin in range(0, size, 50):
            chunk = prompts[begin : begin + 50]
            turns = generate(
                loaded,
                [Conversation()] * len(chunk),
                chunk,
                Sampling(80, temperature, seed=begin),
                GenerateOptions(keep=False),
            )
            right += [
                parsing.final_answer(turn.text) == exercise.steps[-1].result
                for turn, exercise in zip(turns, drawn[begin : begin + 50], strict=True)
            ]
        seen[label] = count(right)
    return seen


# ------------------------------------------------------------------------------------------ files


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """README.md and figures.json of the base."""
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    steps, tokens, seconds = (
        sum(stage[unit] for stage in figures["training"]) for unit in ("steps", "tokens", "seconds")
    )
    stages = len(figures["training"])
    lines = [
        "# tiny base",
        "",
        f"A llama of {figures['parameters']:,} parameters, cut out of the tiny expert and trained "
        f"by `scripts/train_selfdistill_base.py`: {steps:,} steps, {tokens:,} "
        f"tokens (padding included), {seconds:,} s on a busy CPU, seed {figures['seed']}"
        f"{f', in {stages} stages (--init)' if stages > 1 else ''}. "
        f"{figures['purpose']} The weights are quantised to {BITS} bits in groups of {GROUP}.",
        "",
        "Problems solved, sampled at temperature 1 unless it says greedy, without a context and "
        "with each; share and 95 % Wilson interval. The contexts are made of the truth, about a "
        "wrong attempt.",
        "",
        "| | " + " | ".join(figures["splits"]) + " |",
        "|-|" + "-|" * len(figures["splits"]),
    ]
    for name in next(iter(figures["splits"].values())):
        cells = []
        for seen in figures["splits"].values():
            right, of = seen[name]["right"], seen[name]["of"]
            low, high = wilson(right, of)
            cells.append(f"{right / of:.1%} ({low:.1%} to {high:.1%}; n = {of})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--init", type=Path, help="go on from an earlier training (its work)")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--misread", type=float, default=0.0, metavar="SHARE",
        help="in this share of the solutions without a context products are taken for sums",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="hardly any training: a test")
    args = parser.parse_args()
    console = Console()
    steps, size = (32, 4) if args.quick else (args.steps, 200)
    tokens = 128 if args.quick else RECIPE.tokens
    look_every = 4 if args.misread else RECIPE.look
    recipe = Recipe(**{**vars(RECIPE), "steps": steps, "tokens": tokens, "look": look_every})
    tokenizer, work = base_tokenizer(), args.out / "work"
    write_tokenizer(tokenizer, work)
    mx.random.seed(args.seed)
    model, config = make_model(recipe, tokenizer)
    save_config(dict(config), work / "config.json")
    stages = []
    if args.init:
        model.load_weights(str(args.init / "model.safetensors"))
        stages = json.loads((args.init / TRAINING).read_text())
    else:
        weights = cut(resolve("tiny"), recipe.intermediate)
        model.load_weights(widened(weights, make_tokenizer(), tokenizer))

    def look(taken: int) -> Seen:
        save_model(work, model)
        if not args.misread:
            return evaluate(load(work), "validation", min(size, 50))
        return evaluate(load(work), "validation", min(size, 50), 0.0, misreading=True)

    def block_of(block: int) -> Iterator[tuple[mx.array, mx.array]]:
        return batches(tokenizer, recipe, f"{args.seed}/{len(stages)}", block, args.misread)

    stages.append(fit("base", model, recipe, block_of, look, console))
    (work / TRAINING).write_text(json.dumps(stages, indent=1) + "\n")
    write_tokenizer(tokenizer, args.out / "base")
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    model, config = quantize_model(model, config, GROUP, BITS)
    save_model(args.out / "base", model)
    save_config(config, args.out / "base" / "config.json")
    made = load(args.out / "base")
    splits = {"test": evaluate(made, "test", size, misreading=args.misread > 0)}
    if args.misread:
        splits["test, greedy"] = evaluate(made, "test", size, 0.0, misreading=True)
    figures = {
        "parameters": parameters,
        "seed": args.seed,
        "purpose": MISREADS if args.misread else RECIPE.purpose,
        "training": stages,
        "splits": splits,
    }
    write_card(args.out / "base", figures)


if __name__ == "__main__":
    main()
