"""Whether a pair of one architecture is right in every way that the method needs of it.

The references know nothing of this package's view of a model: logits are ``model(tokens)``, hidden
states are what the blocks' own classes return while that runs, and replies are written by asking
for the whole text's logits again for each token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.config import LossOptions, ModelOptions, TrainingOptions
from mlx_fd.export import mlx_dir
from mlx_fd.export.source import open_source
from mlx_fd.feedback.distill import collate, update
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.samples import Sample, read_text
from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import generate
from mlx_fd.models.loading import Loaded, load, open_as_loaded
from mlx_fd.models.memory import Memory, Workload, estimate
from mlx_fd.models.student import prepare, save_student
from mlx_fd.models.view import View
from mlx_fd.models.writing import Sampling, Turn
from support.dense_losses import language_model_loss, logit_loss
from support.sums import loss_sums

OPTIONS = LossOptions(losses=("lm", "hidden", "logit"))
FACTORS = {"lm": 0.01, "hidden": 0.7, "logit": 0.03}
# Longer than the small models' windows together, of three lengths, none the number of heads.
LENGTHS = ((30, 9), (5, 12), (17, 4))


def tokens_of(length: int, seed: int) -> tuple[int, ...]:
    """Tokens that end no turn."""
    rng = np.random.default_rng(seed)
    return tuple(map(int, rng.integers(3, 380, length)))


def _states(made: mx.array) -> mx.array:
    """Hidden states [B, T, d] as they are now; the first stream's where a block passes on several.

    What comes after a block may write into its very array.
    """
    return (made[0] if made.ndim == 4 else made) * 1


def logits_of(model: nn.Module, tokens: mx.array) -> mx.array:
    """A model's own logits, with a cache as when it writes: some need one to share keys."""
    made: mx.array = model(tokens, cache=make_prompt_cache(model))
    return made


TEXT = mx.array([tokens_of(40, 7)])


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[mx.array]]:
    """What goes into the first block and comes out of each, while a model runs."""
    seen: list[mx.array] = []
    blocks = {id(block) for block in model.layers if block is not None}
    kinds = {type(block): type(block).__call__ for block in model.layers if block is not None}

    def watching(call: Any) -> Any:
        def called(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(block) in blocks and not seen:
                seen.append(_states(next(iter((*args, *kwargs.values())))))
            made = call(block, *args, **kwargs)
            if id(block) in blocks:
                seen.append(_states(made[0] if isinstance(made, tuple) else made))
            return made

        return called

    for kind, call in kinds.items():
        kind.__call__ = watching(call)
    try:
        yield seen
    finally:
        for kind, call in kinds.items():
            kind.__call__ = call


def check_body(view: View) -> None:
    """The module that a model card names makes final hidden states of tokens."""
    if view.body is not None:
        body = eval(view.body, {"model": view.model})
        made = body(TEXT, cache=None)
        assert mx.abs(made - view.forward(TEXT).final).max().item() < 1e-3


def reference_losses(pair: Pair, samples: Sequence[Sample]) -> tuple[mx.array, dict[str, mx.array]]:
    """The weighted losses, sample by sample, from the models' own logits."""
    sums = {name: mx.array(0.0) for name in FACTORS}
    for sample in samples:
        tokens = mx.array([[*sample.prompt, *sample.target]])
        span = slice(len(sample.prompt) - 1, -1)
        with watched(pair.student.model) as ours:
            student = logits_of(pair.student.model, tokens)[:, span]
        with watched(pair.expert.model) as theirs:
            expert = mx.stop_gradient(logits_of(pair.expert.model, tokens)[:, span])
        mask = mx.ones((1, len(sample.target)))
        sums["lm"] += language_model_loss(student, mx.array([sample.target]), mask)[0]
        sums["logit"] += logit_loss(
            student,
            expert,
            mask,
            kl=OPTIONS.kl,
            temperature=OPTIONS.loss_temperature,
            vocab=pair.vocab,
            standardize=False,
        )[0]
        cosines = []
        for mine, pick in zip(ours, aligned_layers(len(ours), len(theirs)), strict=True):
            a = pair.student.projection(mine[0, span].astype(mx.float32).mean(axis=0))
            b = theirs[pick][0, span].astype(mx.float32).mean(axis=0)
            cosines.append((a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum()))
        sums["hidden"] += 1 - mx.stack(cosines).mean()
    return sum(FACTORS[name] * value for name, value in sums.items()), sums


def samples_of(pair: Pair) -> list[Sample]:
    """Texts of three lengths, as the expert reads them."""
    found = []
    for number, (before, length) in enumerate(LENGTHS):
        prompt, target = tokens_of(before, number), tokens_of(length, 10 + number)
        reading = read_text(pair, Conversation(prompt[:-1]), prompt, target, OPTIONS)
        found.append(Sample(prompt, target, reading, None))
    return found


def check_gradient(pair: Pair, samples: Sequence[Sample]) -> None:
    """Losses and gradients of a padded batch are those of the models' own logits and blocks."""
    batch = collate(samples)
    # Away from where LoRA begins, at which half of its gradient is 0.
    for _, layer in pair.student.model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = tree_map(lambda b: 0.05 * mx.random.normal(b.shape), layer.lora_b)

    def ours() -> tuple[mx.array, dict[str, mx.array]]:
        return loss_sums(pair.student, pair.expert, batch, OPTIONS, pair.vocab, FACTORS)

    (_, found), gradient = nn.value_and_grad(pair.student, ours)()
    (_, wanted), reference = nn.value_and_grad(
        pair.student, lambda: reference_losses(pair, samples)
    )()
    for name, value in wanted.items():
        assert math.isclose(float(found[name]), float(value), rel_tol=1e-3, abs_tol=1e-4), (
            f"{name}: {float(found[name])}, not {float(value)}"
        )
    theirs = dict(tree_flatten(reference))
    named = {name: value for name, value in tree_flatten(gradient) if "score_head" not in name}
    whole = math.sqrt(sum(float(mx.square(theirs[name]).sum()) for name in named))
    assert whole > 1e-4
    for name, value in named.items():
        apart = math.sqrt(float(mx.square(value - theirs[name]).sum()))
        assert apart < 2e-3 * whole, f"gradient of {name}: {apart / whole:.2g} of the whole apart"


def greedy(loaded: Loaded, tokens: Sequence[int], turn: Turn) -> list[int]:
    """The likeliest token at each place of a turn, from the whole text's logits at once."""
    logits = logits_of(loaded.model, mx.array([[*tokens, *turn.tokens[:-1]]]))[0]
    likeliest: Any = mx.argmax(logits[len(tokens) - 1 :, : loaded.vocab], axis=-1).tolist()
    return likeliest


def check_generation(loaded: Loaded) -> None:
    """Two turns of a ragged batch are what each conversation alone gives, without a cache."""
    before = [Conversation()] * 3
    for number, lengths in enumerate(((21, 3, 40), (2, 30, 9))):
        prompts = [tokens_of(length, 100 * number + length) for length in lengths]
        turns = generate(loaded, before, prompts, Sampling(6))
        for old, prompt, turn in zip(before, prompts, turns, strict=True):
            wanted = greedy(loaded, (*old.tokens, *prompt), turn)
            assert list(turn.tokens) == wanted, f"turn {number}: {turn.tokens}, not {wanted}"
            assert turn.finished == (turn.tokens[-1] in loaded.tokenizer.eos_token_ids)
        before = [turn.conversation for turn in turns]


def check_update(pair: Pair, samples: Sequence[Sample]) -> None:
    """A LoRA step down the gradient lowers the loss."""
    training = TrainingOptions(max_grad_norm=0.05)
    done = [update(pair, optim.SGD(1.0), samples, FACTORS, OPTIONS, training) for _ in range(2)]
    assert not any(one.skipped for one in done)
    assert done[1].total < done[0].total


def estimated(expert: Path, student: Path, options: ModelOptions) -> Memory:
    """What a run of the size of these checks is said to need, from shapes alone."""
    trained, _ = open_as_loaded(student)
    prepare(trained, options)
    work = Workload(
        batch_size=len(LENGTHS),
        micro_batch=len(LENGTHS),
        prompt_tokens=40,
        request_tokens=30,
        later_tokens=30,
        max_answer_tokens=6,
        max_feedback_tokens=12,
    )
    return estimate(open_as_loaded(expert)[0], trained, work)


def check_export(pair: Pair, base: mx.array, folder: Path, options: ModelOptions) -> None:
    """What is written is the live student, and not its base, whose logits on the text are given."""
    adapter = folder / "adapter"
    adapter.mkdir()
    save_student(pair.student, options, pair.student_lm.path, adapter)
    pair.student.eval()
    live = logits_of(pair.student.model, TEXT)
    out = folder / "out"
    out.mkdir()
    mlx_dir.write_model(open_source(str(pair.student_lm.path), adapter), out)
    again = logits_of(load(out).model, TEXT)
    assert mx.abs(again - live).max().item() < 1e-3
    assert mx.abs(base - live).max().item() > 1e-2
