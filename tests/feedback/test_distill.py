import dataclasses
import json

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load as mlx_load

from mlx_fd.config import LossOptions, TrainingOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.distill import (
    collate,
    counts,
    make_optimizer,
    measure,
    measure_each,
    optimizer_arrays,
    set_rates,
    top_k_error,
    update,
)
from mlx_fd.feedback.loss_terms import LOSSES
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import Sample, TeacherOutputs, read_text, solution_of
from mlx_fd.losses.graph import pool
from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.models.attention_taps import log_attention
from mlx_fd.models.conversation import Conversation, prefill
from mlx_fd.models.student import load_student, make_student, save_student
from mlx_fd.problems import Problem
from mlx_fd.problems.prompts import Answer
from support import reference_losses as reference
from support.dense_losses import language_model_loss, logit_loss
from support.pairs import logits_of, make_dirs, make_plan
from support.summed_losses import score_loss
from support.sums import loss_sums

OPTIONS = LossOptions()
WEIGHTS = {"lm": 0.1, "hidden": 0.2, "score": 0.3, "logit": 0.4}
LENGTHS = [(5, 4), (9, 1), (3, 7), (12, 3), (4, 4), (7, 2), (6, 6), (8, 5)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(*make_dirs(tmp_path_factory.mktemp("pair")))


@pytest.fixture
def pair(plan):
    return open_pair(plan)


def samples_of(pair, options=OPTIONS, **changes):
    rng = np.random.default_rng(0)
    found = []
    for number, (before, length) in enumerate(LENGTHS):
        prompt = tuple(map(int, rng.integers(0, 390, before)))
        target = tuple(map(int, rng.integers(0, 390, length)))
        score = None if number in (1, 4) else float(rng.uniform(-1, 1))
        reading = read_text(pair, Conversation(prompt[:-1]), prompt, target, options)
        own = (*prompt, *map(int, rng.integers(0, 390, length + 2))) if score is not None else ()
        sample = Sample(prompt, target, reading, score, on_policy=number in (2, 5), own=own)
        found.append(sample)
    return [dataclasses.replace(sample, **changes) for sample in found]


def weights_of(student):
    return {name: np.array(value) for name, value in tree_flatten(student.trainable_parameters())}


def step(pair, samples, training, weights=WEIGHTS, options=OPTIONS, rate=1.0):
    before = weights_of(pair.student)
    done = update(pair, optim.SGD(rate), samples, weights, options, training)
    after = weights_of(pair.student)
    return done, {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize(
    ("score_at", "goes_on"),
    [("prompt", False), ("feedback", False), ("own", False), ("own", True)],
)
def test_losses_are_their_definitions_over_whole_sequences(pair, monkeypatch, score_at, goes_on):
    """Each loss recomputed sample by sample in float64 from full forward passes."""
    samples = samples_of(pair)
    monkeypatch.setattr(pair.student, "score_at", score_at)
    monkeypatch.setattr(pair.student, "goes_on", goes_on)
    monkeypatch.setattr(
        pair.student.score_head, "weight", mx.random.normal(pair.student.score_head.weight.shape)
    )
    totals = dict.fromkeys(WEIGHTS, 0.0)
    for sample in samples:
        tokens = mx.array([[*sample.prompt, *sample.target]])
        ours = pair.student.view.forward(tokens)
        theirs = pair.expert.view.forward(tokens)
        span = slice(len(sample.prompt) - 1, -1)
        mask = np.ones((1, len(sample.target)))

        def logits(view, seen, span=span):
            return np.array(logits_of(view, seen.final[:, span]), dtype=np.float64)

        student_logits = logits(pair.student.view, ours)
        expert_logits = logits(pair.expert.view, theirs)
        targets = np.array([sample.target])
        if not sample.on_policy:
            totals["lm"] += reference.language_model_loss(student_logits, targets, mask)[0]
        totals["logit"] += reference.logit_loss(
            student_logits,
            expert_logits,
            mask,
            kl="forward",
            temperature=OPTIONS.loss_temperature,
            vocab=400,
            standardize=False,
        )[0]
        picks = aligned_layers(len(ours.layers), len(theirs.layers))
        projection = np.array(pair.student.projection.weight, dtype=np.float64)
        totals["hidden"] += reference.hidden_alignment_loss(
            [np.array(layer[:, span], dtype=np.float64) for layer in ours.layers],
            [np.array(theirs.layers[pick][:, span], dtype=np.float64) for pick in picks],
            mask,
            lambda pooled, w=projection: w @ pooled,
        )[0]
        if sample.expert_score is not None:
            place = len(sample.prompt) - 1 if score_at == "prompt" else -2
            if score_at == "own":
                ours = pair.student.view.forward(mx.array([sample.own]))
            score = pair.student.score(ours.final[0, place]).item()
            totals["score"] += (score - sample.expert_score) ** 2
    norms = counts(samples, OPTIONS)
    found = measure(pair.student, pair.expert, samples, OPTIONS, 400, 3)
    for name, total in totals.items():
        assert found[name] == pytest.approx(total / norms[name], rel=2e-4), name
    # Each by itself, without a look and in an update's own pass.
    each = measure_each(pair.student, pair.expert, samples, OPTIONS, 400, 3)
    for sample, losses in zip(samples, each, strict=True):
        alone = measure(pair.student, pair.expert, [sample], OPTIONS, 400, 1)
        assert losses == pytest.approx(alone, rel=1e-5, abs=1e-6)
    done, change = step(pair, samples, TrainingOptions(micro_batch=3, max_grad_norm=0.0))
    assert done.losses == pytest.approx(found, rel=1e-5)
    for losses, before in zip(done.each, each, strict=True):
        assert losses == pytest.approx(before, rel=1e-5, abs=1e-6)
    assert change["score_head.weight"].any()


def test_counts():
    class Item:
        def __init__(self, length, score, own):
            self.target, self.expert_score, self.on_policy = (0,) * length, score, own
            self.answer, self.steps, self.matched = (), (), ()

    found = counts([Item(3, 0.5, False), Item(4, None, True)], OPTIONS)
    assert found == {"lm": 3.0, "hidden": 2.0, "score": 1.0, "logit": 7.0}
    assert counts([Item(3, None, False)], LossOptions(losses=("score",))) == {"score": 0.0}


def test_each_step_drops_other_entries_and_looking_drops_none(plan):
    models = dataclasses.replace(plan.config.models, lora_dropout=0.5)
    pair = open_pair(
        dataclasses.replace(plan, config=dataclasses.replace(plan.config, models=models))
    )
    samples = samples_of(pair)
    plain = open_pair(plan)
    # LoRA begins at zero, so the losses are the base's; only the gradient knows of the dropout.
    assert measured(pair, samples) == measured(plain, samples)
    training = TrainingOptions(max_grad_norm=0.0, lora_rate=0.0)
    optimizer = make_optimizer(pair.student, training)
    norms = [update(pair, optimizer, samples, WEIGHTS, OPTIONS, training) for _ in range(2)]
    assert norms[0].gradient_norm != pytest.approx(norms[1].gradient_norm, rel=1e-6)
    assert measured(pair, samples) == measured(pair, samples)


def measured(pair, samples):
    return measure(pair.student, pair.expert, samples, OPTIONS, 400, 4)


@pytest.mark.parametrize("other", [{"micro_batch": 2}, {"micro_batch": 3}, {"micro_batch": 1}])
def test_batch_of_8_is_the_same_update_in_micro_batches(plan, other):
    whole = TrainingOptions(micro_batch=8, max_grad_norm=0.0)
    results = []
    for training in (whole, dataclasses.replace(whole, **other)):
        pair = open_pair(plan)
        results.append(step(pair, samples_of(pair), training))
    (one, delta), (two, other_delta) = results
    assert two.total == pytest.approx(one.total, rel=1e-5)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for name, change in delta.items():
        np.testing.assert_allclose(other_delta[name], change, rtol=1e-3, atol=2e-6)
    assert max(np.abs(change).max() for change in delta.values()) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_activations_changes_nothing(plan, dropout):
    models = dataclasses.replace(plan.config.models, lora_dropout=dropout)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, models=models))
    results = []
    for recompute in (False, True):
        pair = open_pair(plan)
        training = TrainingOptions(max_grad_norm=0.0, grad_checkpoint=recompute)
        results.append(step(pair, samples_of(pair), training)[1])
    for name, change in results[0].items():
        np.testing.assert_allclose(results[1][name], change, rtol=1e-4, atol=1e-7)


def test_gradient_is_the_slope_of_the_measured_losses(plan):
    """Central differences of the weighted losses along the gradient's own direction."""
    pair = open_pair(plan)
    samples = samples_of(pair)
    _, change = step(pair, samples, TrainingOptions(max_grad_norm=0.0), rate=1.0)
    norm = np.sqrt(sum(float((c.astype(np.float64) ** 2).sum()) for c in change.values()))

    def total_at(distance):
        moved = open_pair(plan)
        start = weights_of(moved.student)
        moved.student.update(
            tree_unflatten([(n, mx.array(start[n] + distance * change[n] / norm)) for n in change])
        )
        found = measure(moved.student, moved.expert, samples, OPTIONS, 400, 8)
        return sum(WEIGHTS[name] * value for name, value in found.items())

    grad = (total_at(2e-2) - total_at(-2e-2)) / 4e-2
    assert grad == pytest.approx(-norm, rel=2e-2)


def test_clipping_bounds_the_step(pair):
    done, change = step(pair, samples_of(pair), TrainingOptions(max_grad_norm=1e-3))
    norm = np.sqrt(sum(float((c**2).sum()) for c in change.values()))
    assert done.gradient_norm > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("poison", ["logits", "score", "weight"])
def test_a_step_that_is_not_finite_changes_nothing(pair, plan, poison):
    samples = samples_of(pair)
    weights = WEIGHTS
    if poison == "logits":
        poisoned = dataclasses.replace(
            samples[3].expert, targets=samples[3].expert.targets * mx.nan
        )
        samples[3] = dataclasses.replace(samples[3], expert=poisoned)
    elif poison == "score":
        samples[3] = dataclasses.replace(samples[3], expert_score=float("inf"))
    else:
        weights = {**WEIGHTS, "lm": 1e39}
    optimizer = make_optimizer(pair.student, TrainingOptions())
    before, state = weights_of(pair.student), optimizer_arrays(optimizer)
    state = {name: np.array(value) for name, value in state.items()}
    done = update(pair, optimizer, samples, weights, OPTIONS, TrainingOptions())
    assert done.skipped
    after = weights_of(pair.student)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    for name, value in optimizer_arrays(optimizer).items():
        assert np.array_equal(np.array(value), state[name])
    healthy = update(pair, optimizer, samples_of(pair), WEIGHTS, OPTIONS, TrainingOptions())
    assert not healthy.skipped
    assert all(np.isfinite(value).all() for value in weights_of(pair.student).values())


def test_a_score_that_could_not_be_read_enters_nothing(pair):
    samples = samples_of(pair, expert_score=None)
    assert "score" not in measure(pair.student, pair.expert, samples, OPTIONS, 400, 4)
    done, change = step(pair, samples, TrainingOptions(max_grad_norm=0.0))
    assert "score" not in done.losses
    assert not change["score_head.weight"].any() and not change["score_head.bias"].any()
    assert np.isfinite(done.total)


def test_on_policy_samples_have_no_language_model_loss(pair):
    samples = samples_of(pair, on_policy=True)
    found = measure(pair.student, pair.expert, samples, OPTIONS, 400, 4)
    assert set(found) == {"hidden", "score", "logit"}


@pytest.mark.parametrize("name", OPTIONS.losses)
def test_each_loss_falls_on_what_it_is_trained_on(pair, name):
    options = LossOptions(losses=(name,))
    samples = samples_of(pair, options)
    training = TrainingOptions(lora_rate=1e-2, score_rate=1e-2, projection_rate=1e-2)
    optimizer = make_optimizer(pair.student, training)
    first = measure(pair.student, pair.expert, samples, options, 400, 8)[name]
    for _ in range(30):
        update(pair, optimizer, samples, {name: 1.0}, options, training)
    last = measure(pair.student, pair.expert, samples, options, 400, 8)[name]
    assert last < 0.8 * first


@pytest.mark.parametrize("part", ["lora", "score", "projection"])
def test_each_part_has_its_own_learning_rate(pair, part):
    rates = {"lora_rate": 0.0, "score_rate": 0.0, "projection_rate": 0.0, f"{part}_rate": 1e-2}
    training = TrainingOptions(weight_decay=0.0, **rates)
    optimizer = make_optimizer(pair.student, training)
    before = weights_of(pair.student)
    samples = samples_of(pair)
    update(pair, optimizer, samples, WEIGHTS, OPTIONS, training)
    after = weights_of(pair.student)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    heads = {"score_head.weight", "score_head.bias"}
    expected = {
        "score": heads,
        "projection": {"projection.weight"},
        "lora": {name for name in before if name.startswith("model.")},
    }[part]
    assert moved and moved <= expected


def test_rates_fall_to_nothing_over_the_run(pair):
    rates = {"score_rate": 3e-3, "projection_rate": 2e-3, "lora_rate": 1e-3}
    options = TrainingOptions(**rates, lr_schedule="constant")
    falling = dataclasses.replace(options, lr_schedule="linear")
    optimizer = make_optimizer(pair.student, options)
    for training, progress, share in ((falling, 0.75, 0.25), (falling, 0.0, 1), (options, 0.75, 1)):
        set_rates(optimizer, training, progress)
        rates = [part.learning_rate.item() for part in optimizer.optimizers]
        assert rates == pytest.approx([share * rate for rate in (3e-3, 2e-3, 1e-3)])


def test_last_layer_only(pair):
    options = LossOptions(hidden_layers="last", losses=("hidden",))
    samples = samples_of(pair, options)
    assert all(len(sample.expert.pooled) == 1 for sample in samples)
    found = measure(pair.student, pair.expert, samples, options, 400, 4)["hidden"]
    every = measure(pair.student, pair.expert, samples_of(pair), OPTIONS, 400, 4)["hidden"]
    assert 0 < found < 2 and found != pytest.approx(every)


@pytest.mark.parametrize(
    "models",
    [
        {},
        {"lora_dropout": 0.4},
        {"train": "dora", "lora_dropout": 0.2, "lora_keys": ("self_attn.v_proj", "mlp.up_proj")},
    ],
)
def test_saved_student_and_optimizer_go_on_bit_for_bit(plan, tmp_path, models):
    options = dataclasses.replace(plan.config.models, **models)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, models=options))

    def learn(pair, optimizer, steps):
        samples = samples_of(pair)
        for _ in range(steps):
            update(pair, optimizer, samples, WEIGHTS, OPTIONS, TrainingOptions())

    one = open_pair(plan)
    optimizer = make_optimizer(one.student, TrainingOptions())
    learn(one, optimizer, 2)
    save_student(one.student, plan.config.models, plan.student_path, tmp_path)
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), optimizer_arrays(optimizer))
    learn(one, optimizer, 2)

    two = open_pair(plan)
    again = make_optimizer(two.student, TrainingOptions())
    load_student(two.student, tmp_path)
    saved = mx.load(str(tmp_path / "optimizer.safetensors"))
    again.state = tree_unflatten(list(saved.items()))
    learn(two, again, 2)
    for name, value in weights_of(one.student).items():
        assert np.array_equal(value, weights_of(two.student)[name]), name


def test_mlx_lm_opens_the_adapter(pair, plan, tmp_path):
    training = TrainingOptions(lora_rate=1e-2)
    optimizer = make_optimizer(pair.student, training)
    samples = samples_of(pair)
    update(pair, optimizer, samples, WEIGHTS, OPTIONS, training)
    save_student(pair.student, plan.config.models, plan.student_path, tmp_path)
    model, _ = mlx_load(str(plan.student_path), adapter_path=str(tmp_path))
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert mx.allclose(model(tokens), pair.student.model(tokens), atol=1e-4)
    plain, _ = mlx_load(str(plan.student_path))
    assert not mx.allclose(plain(tokens), pair.student.model(tokens), atol=1e-2)


def test_weights_of_another_student_are_refused(pair, plan, tmp_path):
    save_student(pair.student, plan.config.models, plan.student_path, tmp_path)
    other = dataclasses.replace(plan.config.models, lora_rank=3)
    model = open_pair(dataclasses.replace(plan, config=dataclasses.replace(plan.config))).expert
    stranger = make_student(model.view, 32, other, 0)
    with pytest.raises(UserError, match="another student"):
        load_student(stranger, tmp_path)
    (tmp_path / "heads.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_student(pair.student, tmp_path)


def test_full_training_moves_every_weight_but_not_the_experts(plan):
    options = dataclasses.replace(plan.config.models, train="full")
    full = dataclasses.replace(plan, config=dataclasses.replace(plan.config, models=options))
    # The same checkpoint on both sides: base weights are one array in memory.
    same = dataclasses.replace(full, student_path=plan.expert_path)
    pair = open_pair(same)
    expert = {name: np.array(v) for name, v in tree_flatten(pair.expert.model.parameters())}
    _, change = step(pair, samples_of(pair), TrainingOptions(max_grad_norm=0.0))
    assert any(name.startswith("model.model.embed") and c.any() for name, c in change.items())
    for name, value in tree_flatten(pair.expert.model.parameters()):
        assert np.array_equal(expert[name], np.array(value))


def test_score_head_starts_without_an_opinion_and_projection_as_identity(plan):
    same = open_pair(dataclasses.replace(plan, student_path=plan.expert_path))
    assert same.student.score(mx.ones((3, 32))).tolist() == [0.0, 0.0, 0.0]
    assert mx.array_equal(same.student.projection.weight, mx.eye(32))


def test_lora_initialisation_depends_on_the_seed_alone(plan):
    mx.random.normal((7,))
    one = weights_of(open_pair(plan).student)
    mx.random.normal((3,))
    two = weights_of(open_pair(plan).student)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    seeded = dataclasses.replace(
        plan,
        config=dataclasses.replace(
            plan.config, episode=dataclasses.replace(plan.config.episode, seed=1)
        ),
    )
    three = weights_of(open_pair(seeded).student)
    assert any(not np.array_equal(one[name], three[name]) for name in one)


# --- the engine against whole logits ---


def dense_total(student, expert, samples, options, factors):
    """The total of an update's losses on whole logits, differentiated by MLX: the definition."""
    batch = collate(samples)
    length = batch.mask.shape[1]
    seen = student.view.forward(batch.tokens)

    def at_text(hidden):
        return mx.take_along_axis(hidden, batch.positions[..., None], axis=1)

    def padded(rows):
        rows = [mx.pad(r, [(0, length - len(r))] + [(0, 0)] * (r.ndim - 1)) for r in rows]
        return mx.stack(rows)

    logits = logits_of(student.view, at_text(seen.final))
    theirs = logits_of(expert.view, padded([s.expert.targets for s in samples]))
    targets = padded([mx.array(s.target) for s in samples])
    lm_mask = batch.mask * mx.array([[float(not s.on_policy)] for s in samples])
    shared = {
        "kl": options.kl,
        "temperature": options.loss_temperature,
        "vocab": 400,
        "standardize": options.standardize_logits,
    }
    sums = {
        "lm": language_model_loss(logits, targets, lm_mask)[0],
        "logit": logit_loss(logits, theirs, batch.mask, **shared)[0],
        "hidden": 0.0,
        "score": score_loss(
            student.score(at_text(seen.final)[:, 0]), batch.scores, batch.score_mask
        )[0],
    }
    for layer, pooled in zip(seen.layers, batch.expert_pooled, strict=True):
        ours = student.projection(pool(at_text(layer), batch.mask))
        cosines = (ours * pooled).sum(-1) / (
            mx.linalg.norm(ours, axis=-1) * mx.linalg.norm(pooled, axis=-1)
        )
        sums["hidden"] = sums["hidden"] + (1 - cosines).sum() / len(seen.layers)
    return sum(factors[name] * value for name, value in sums.items()), sums


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kl", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_losses_and_gradients_are_the_dense_ones(plan, kl, standardize, train, monkeypatch):
    """In chunks of a few tokens, with a head that is frozen or trains at both ends."""
    monkeypatch.setattr("mlx_fd.losses.chunks.LOGIT_BUDGET", 4 * 400 * 4 * 7)
    models = dataclasses.replace(plan.config.models, train=train)
    config = dataclasses.replace(plan.config, models=models)
    pair = open_pair(dataclasses.replace(plan, config=config))
    options = LossOptions(kl=kl, standardize_logits=standardize)
    samples = samples_of(pair)
    factors = {name: WEIGHTS[name] / count for name, count in counts(samples, options).items()}

    def dense(student):
        return dense_total(student, pair.expert, samples, options, factors)

    def engine(student):
        return loss_sums(student, pair.expert, collate(samples), options, 400, factors)

    def gradient(loss):
        (total, sums), grads = nn.value_and_grad(pair.student, lambda: loss(pair.student))()
        return total.item(), sums, dict(tree_flatten(grads))

    expected, expected_sums, expected_slopes = gradient(dense)
    found, sums, grads = gradient(engine)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in sums.items():
        assert value.item() == pytest.approx(expected_sums[name].item(), rel=1e-5), name
    for name, grad in expected_slopes.items():
        scale = max(float(mx.abs(grad).max()), 1e-6)
        assert float(mx.abs(grad - grads[name]).max()) <= 1e-5 * scale, name


# --- the three losses of the reasoning method ---

TEXT = "2 + 3 = 5.\nSo he has 5 eggs.\n#### 5"
REASONING = LossOptions(losses=("lm", "answer", "reasoning", "attention"), solutions=True)


def solutions_of(pair, options=REASONING):
    tokens = tuple(pair.expert.tokenizer.encode(TEXT, add_special_tokens=False))
    solution = solution_of(
        pair, Problem("p", "2 + 3?", "", "5"), Answer(TEXT, None, tokens), options
    )
    return [solution, *samples_of(pair, options)[:3]]


def test_a_solution_knows_its_answer_and_its_steps(pair):
    solution = solutions_of(pair)[0]
    decode = pair.expert.tokenizer.decode
    answer = [
        token
        for token, is_answer in zip(solution.target, solution.answer, strict=True)
        if is_answer
    ]
    assert decode(answer).strip() == "#### 5"
    assert sum(solution.steps) == pytest.approx(2)
    assert not any(a and s for a, s in zip(solution.answer, solution.steps, strict=True))
    found = counts(solutions_of(pair), REASONING)
    assert (found["answer"], found["reasoning"]) == (1.0, pytest.approx(2))
    assert found["attention"] == sum(len(s.target) for s in solutions_of(pair))


def test_an_answer_that_is_no_number_is_learned_too(pair):
    """A choice's letter was none, and its line was a step of the reasoning."""
    text = "It is red.\n#### B"
    tokens = tuple(pair.expert.tokenizer.encode(text, add_special_tokens=False))
    problem = Problem("p", "Which?", "", "B", "choice", ("blue", "red"))
    found = solution_of(pair, problem, Answer(text, None, tokens), REASONING)
    decode = pair.expert.tokenizer.decode
    answer = [token for token, of in zip(found.target, found.answer, strict=True) if of]
    assert decode(answer).strip() == "#### B"
    assert sum(found.steps) == pytest.approx(1)
    assert counts([found], REASONING)["answer"] == 1.0


@pytest.mark.parametrize("heads", ["mean", "aligned"])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_reasoning_losses_are_their_definitions(pair, heads, layers):
    """Sample by sample in float64, from full passes of both models over the whole text."""
    options = dataclasses.replace(REASONING, attention_heads=heads, hidden_layers=layers)
    samples = solutions_of(pair, options)
    totals = dict.fromkeys(("answer", "reasoning", "attention"), 0.0)
    for sample in samples:
        tokens = mx.array([[*sample.prompt, *sample.target[:-1]]])
        span = slice(len(sample.prompt) - 1, None)
        ours, theirs = (m.view.forward(tokens, attention=True) for m in (pair.student, pair.expert))
        logits = [
            np.array(logits_of(view, seen.final[:, span]), dtype=np.float64)
            for view, seen in ((pair.student.view, ours), (pair.expert.view, theirs))
        ]
        if sample.answer:
            targets, mask = np.array([sample.target]), np.array([sample.answer])
            totals["answer"] += reference.answer_matching_loss(logits[0], targets, mask)[0]
            totals["reasoning"] += reference.reasoning_path_loss(
                *logits,
                np.array([sample.steps]),
                kl="forward",
                temperature=options.loss_temperature,
                vocab=400,
                standardize=False,
            )[0]
        blocks = [
            [np.array(log_attention(calls)[:, :, span]) for calls in seen.attention]
            for seen in (ours, theirs)
        ]
        if layers == "last":
            blocks = [each[-1:] for each in blocks]
        totals["attention"] += reference.attention_matching_loss(
            *blocks, np.ones((1, len(sample.target))), heads=heads
        )[0]
    norms = counts(samples, options)
    found = measure(pair.student, pair.expert, samples, options, 400, 3)
    for name, total in totals.items():
        assert found[name] == pytest.approx(total / norms[name], rel=2e-4), name


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OPTIONS.losses])
def test_each_reasoning_loss_falls_on_what_it_is_trained_on(pair, name):
    options = dataclasses.replace(REASONING, losses=(name,))
    samples = solutions_of(pair, options)
    training = TrainingOptions(lora_rate=1e-2)
    optimizer = make_optimizer(pair.student, training)
    first = measure(pair.student, pair.expert, samples, options, 400, 8)[name]
    for _ in range(30):
        update(pair, optimizer, samples, {name: 1.0}, options, training)
    assert measure(pair.student, pair.expert, samples, options, 400, 8)[name] < 0.8 * first


def test_feedback_alone_says_nothing_of_answers(pair):
    found = measure(pair.student, pair.expert, samples_of(pair, REASONING), REASONING, 400, 4)
    assert set(found) == {"lm", "attention"}


def test_the_expert_s_attention_is_the_same_with_a_cache(pair):
    """Read after a conversation whose keys are kept, and read whole."""
    sample = samples_of(pair, REASONING)[3]
    _, before = prefill(pair.expert, Conversation(), sample.prompt)
    assert before.cache is not None
    again = read_text(pair, before, sample.prompt, sample.target, REASONING)
    for name, array in sample.expert.arrays().items():
        np.testing.assert_allclose(again.arrays()[name], array, rtol=1e-4, atol=1e-5)


# --- samples of which the expert's likeliest tokens are kept ---


def test_top_k_samples_give_the_other_losses_unchanged_and_less_divergence(pair):
    whole, top = (
        measure(pair.student, pair.expert, samples_of(pair, options), options, 400, 3)
        for options in (OPTIONS, dataclasses.replace(OPTIONS, teacher_top_k=300))
    )
    for name in ("lm", "hidden", "score"):
        assert top[name] == pytest.approx(whole[name], rel=1e-6)
    assert 0.5 * whole["logit"] < top["logit"] < whole["logit"]
    every = dataclasses.replace(OPTIONS, teacher_top_k=400)
    found = measure(pair.student, pair.expert, samples_of(pair, every), every, 400, 3)
    assert found["logit"] == pytest.approx(whole["logit"], rel=1e-5)


@pytest.mark.parametrize("kl", ["forward", "jsd", "reverse"])
def test_the_error_of_a_top_k_is_reported(pair, kl):
    options = LossOptions(kl=kl, teacher_top_k=40)
    samples = samples_of(pair, options)
    found = top_k_error(pair.student, samples, options, 400)
    whole, top = (
        measure(pair.student, pair.expert, samples_of(pair, o), o, 400, 3)["logit"]
        for o in (LossOptions(kl=kl), options)
    )
    assert found["k"] == 40 and 0 < found["tail_mass"] < 1
    if kl == "reverse":
        assert found["missing_at_most"] is None
    else:
        assert 0 < whole - top <= found["missing_at_most"]


def test_a_sample_comes_back_from_its_arrays_and_json(pair):
    for options in (REASONING, dataclasses.replace(OPTIONS, teacher_top_k=5)):
        for sample in solutions_of(pair, options):
            reading = TeacherOutputs.of(sample.expert.arrays())
            again = Sample.from_json(json.loads(json.dumps(sample.to_json())), reading)
            assert again.to_json() == sample.to_json()
            assert again.expert.arrays().keys() == sample.expert.arrays().keys()
            for name, array in sample.expert.arrays().items():
                assert mx.array_equal(again.expert.arrays()[name], array)
