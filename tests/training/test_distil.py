"""An expert's answers and its word on the student's own: against whole logits, and end to end."""

import dataclasses
import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd import runs
from mlx_fd.config import to_toml
from mlx_fd.errors import UserError
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill import training
from mlx_fd.training.selfdistill.batch import Learner, build_views
from mlx_fd.training.selfdistill.health import health_of
from mlx_fd.training.selfdistill.learning import gradients
from mlx_fd.training.selfdistill.methods import EXPERT_METHODS, configured
from mlx_fd.training.selfdistill.plan import make_plan, open_models
from mlx_fd.training.selfdistill.reading import Expert, forward_teacher_and_student
from mlx_fd.training.selfdistill.rollouts import sample_rollouts
from mlx_fd.training.selfdistill.teacher import adapter, first_teacher
from mlx_fd.training.selfdistill.token_weights import token_weights
from support.draws import ALL, by_day, nightly
from support.pairs import without_seconds
from support.shell import shell

SMALL = {
    "expert": "tiny",
    "episodes": 4,
    "batch_size": 2,
    "max_answer_tokens": 24,
    "probe_size": 1,
    "probe_every": 2,
    "checkpoint_every": 1,
    "lora_rank": 2,
    "lora_rate": 1e-2,
    "num_generations": 1,
    "seed": 2,
}


def config_of(method, **changes):
    return configured(method, {**SMALL, **changes})


@pytest.fixture(scope="module")
def opened():
    """The tiny pair, the student with an adapter that does something."""
    models = open_models(make_plan(config_of("on-policy")))
    model = models.student_lm.model
    mx.random.seed(0)
    changed = [
        (name, 0.2 * mx.random.normal(value.shape) if name.endswith("lora_b") else value)
        for name, value in adapter(model).items()
    ]
    model.load_weights(changed, strict=False)
    return models


def known(opened, config, own=True):
    """What one update is made from: attempts at two problems, read by student and expert."""
    problems = make_plan(config).problems[:2]
    writer = opened.student_lm if own else opened.critic
    groups, _ = sample_rollouts(writer, problems, config, lambda call: 7, own=own)
    learner = Learner(opened, None, {}, config, lambda event: None)
    views = build_views(learner, groups, 0)
    teacher = first_teacher(opened.student_lm.model, config.selfdistill)
    return groups, forward_teacher_and_student(
        opened.student_lm, teacher, groups, views, config.selfdistill, 4, Expert(opened.critic)
    )


def dense(opened, stats, options, divergence):
    """The gradient of a mean over all tokens of a function of both models' whole logits."""
    student, expert = opened.student_lm, opened.critic
    most = options.first_tokens or 1 << 20

    def logprobs(model, item):
        tokens = mx.array([[*item.text.prompt, *item.text.target]])
        at = len(item.text.prompt) - 1
        rows = model(tokens)[0, at:-1, : student.vocab].astype(mx.float32) / options.temperature
        return (rows - mx.logsumexp(rows, axis=-1, keepdims=True))[:most]

    fixed = [mx.stop_gradient(logprobs(expert.model, item)) for item in stats]

    def loss(model):
        parts = [
            divergence(logprobs(model, item), teacher, mx.array(item.text.target[:most]))
            for item, teacher in zip(stats, fixed, strict=True)
        ]
        return mx.concatenate(parts).mean()

    value, grads = nn.value_and_grad(student.model, loss)(student.model)
    return float(value), dict(tree_flatten(grads))


def reverse(ours, theirs, tokens):
    return (mx.exp(ours) * (ours - theirs)).sum(-1)


def forward(ours, theirs, tokens):
    return (mx.exp(theirs) * (theirs - ours)).sum(-1)


def jsd(ours, theirs, tokens):
    middle = mx.logaddexp(ours, theirs) - np.log(2)
    return 0.5 * (forward(middle, theirs, None) + forward(middle, ours, None))


def likelihood(ours, theirs, tokens):
    return -mx.take_along_axis(ours, tokens[:, None], axis=-1).squeeze(-1)


@pytest.mark.parametrize(
    ("method", "changes", "divergence", "own"),
    [
        ("on-policy", {}, reverse, True),
        ("on-policy", {"first_tokens": 5}, reverse, True),
        ("on-policy", {"temperature": 1.5}, reverse, True),
        ("off-policy", {"expert_answers": "all"}, forward, False),
        ("gkd", {}, jsd, True),
        ("sft", {"expert_answers": "all"}, likelihood, False),
    ],
)
def test_the_gradient_is_that_of_whole_logits(opened, method, changes, divergence, own):
    config = config_of(method, **changes)
    options = config.selfdistill
    _, stats = known(opened, config, own)
    weights = token_weights(stats, options, 24)
    head = opened.critic.view.head
    found, _ = gradients(opened.student_lm, stats, weights, options, config.training, head)
    found = dict(tree_flatten(found))
    _, wanted = dense(opened, stats, options, divergence)
    assert found.keys() == wanted.keys()
    largest = max(float(mx.abs(value).max()) for value in wanted.values())
    assert largest > 1e-4
    for name, value in wanted.items():
        assert float(mx.abs(found[name] - value).max()) < 1e-4 * largest, name


def test_wrong_answers_of_the_expert_teach_only_where_all_are_wanted(opened):
    # The student of the pair, which is often wrong, in the expert's place.
    roles = {"expert": "tiny-student", "student": "tiny", "batch_size": 4, "episodes": 4}
    for wanted, taught in (("right", False), ("all", True)):
        config = config_of("off-policy", expert_answers=wanted, **roles)
        groups, stats = known(opened_as(config), config, own=False)
        wrong = [
            item for (attempt,), item in zip(groups, stats, strict=True) if not attempt.correct
        ]
        assert wrong and all((item.teacher is not None) is taught for item in wrong)
        right = [item for (attempt,), item in zip(groups, stats, strict=True) if attempt.correct]
        assert all(item.teacher is not None for item in right)


def opened_as(config):
    return open_models(make_plan(config))


def start(folder, config, stop=lambda: False):
    plan = make_plan(config)
    with runs.locked(folder):
        if not runs.is_run(folder):
            runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, lambda e: None, stop)
        return training.run(job, open_models(plan))


@pytest.mark.parametrize("method", by_day(EXPERT_METHODS))
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, method):
    config = config_of(method, episodes=2, batch_size=1)
    whole = start(tmp_path / "whole", config)
    assert whole["headroom"]["expert"] >= 0 and whole["updates"]["steps"] >= 1
    if not (ALL or method in ("on-policy", "gkd")):
        return  # these two have the student's answers, and both models'
    looks = iter([False, True])
    assert start(tmp_path / "cut", config, lambda: next(looks, True)) is None
    start(tmp_path / "cut", config)
    both = [
        without_seconds(runs.read_lines(tmp_path / name / runs.ATTEMPTS))
        for name in ("whole", "cut")
    ]
    assert both[0] == both[1] and len(both[0]) == 2
    same_adapters(tmp_path / "whole", tmp_path / "cut")


@nightly
@pytest.mark.model
def test_smollm2_takes_steps_and_goes_on_exactly(tmp_path):
    """A real vocabulary; layers of one model, so that both split texts alike."""
    file = tmp_path / "p.jsonl"
    asked = [{"question": f"What is {a} + {a + 1}?", "answer": f"{2 * a + 1}"} for a in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = {
        **{"expert": "smollm2-135m:layers=3", "student": "smollm2-135m:layers=2"},
        **{"problems": str(file), "episodes": 2, "batch_size": 1, "probe_size": 1},
        **{"max_answer_tokens": 8, "lora_rank": 4, "checkpoint_every": 1},
    }
    config = configured("on-policy", given, preset="quick")
    whole = start(tmp_path / "whole", config)
    assert whole["updates"]["steps"] == 2 and whole["updates"]["skipped"] == 0
    looks = iter([False, True])
    assert start(tmp_path / "cut", config, lambda: next(looks, True)) is None
    start(tmp_path / "cut", config)
    same_adapters(tmp_path / "whole", tmp_path / "cut")


def test_health_is_of_both_models_distributions(opened):
    """By the models' whole logits; positions in bins from 0, 8, 16, 32, ..."""
    config = config_of("on-policy", max_answer_tokens=40)
    _, stats = known(opened, config)
    found = health_of(stats)
    student, expert = opened.student_lm, opened.critic
    kl, shared = [], []
    for item in stats:
        tokens = mx.array([[*item.text.prompt, *item.text.target]])
        at = len(item.text.prompt) - 1
        ours, theirs = (
            nn.log_softmax(lm.model(tokens)[0, at:-1, : student.vocab].astype(mx.float32))
            for lm in (student, expert)
        )
        kl.append(np.array(reverse(ours, theirs, None)))
        tops = [np.argsort(-np.array(rows), axis=-1)[:, :10] for rows in (ours, theirs)]
        shared += [len(set(a) & set(b)) / 10 for a, b in zip(*tops, strict=True)]
    every = np.concatenate(kl)
    assert found["tokens"] == len(every) == len(shared)
    assert found["reverse_kl"] == pytest.approx(every.mean(), abs=1e-4)
    assert found["overlap"] == pytest.approx(np.mean(shared), abs=0.02)
    assert [row["first"] for row in found["positions"]] == [0, 8, 16, 32]
    assert sum(row["tokens"] for row in found["positions"]) == len(every)
    second = np.concatenate([row[8:16] for row in kl])
    assert found["positions"][1]["reverse_kl"] == pytest.approx(second.mean(), abs=1e-4)
    assert health_of([dataclasses.replace(item, reverse_kl=None) for item in stats]) is None


def test_an_experts_answers_are_written_and_read_once(tmp_path):
    """A second epoch, a stop within it and a shared cache leave every number as it is."""
    options = {"support": "teacher", "loss_top_k": 20, "epochs": 2, "num_generations": 2}
    options |= {"on_policy_fraction": 0.5, "expert_answers": "all"}
    config = config_of("off-policy", **options)
    whole = start(tmp_path / "whole", config)
    entries = sorted((tmp_path / "whole" / runs.TEACHER).iterdir())
    rows = runs.read_attempts(tmp_path / "whole")
    texts = {tuple(row["tokens"]) for row in rows if row.get("by_expert")}
    assert len(entries) == len(texts) and whole["expert_answers"]["n"] == 4
    # The student's answers of the second epoch are others; the expert's are learned from again.
    own = [row["text"] for row in rows if not row.get("by_expert")]
    assert len(own) == 8 and own[:4] != own[4:]
    metrics = runs.read_self_metrics(tmp_path / "whole")
    assert [row["expert_answers"]["taught"] for row in metrics] == [2, 2, 2, 2]
    assert all(row["health"]["tokens"] > 0 for row in metrics)
    times = [entry.stat().st_mtime_ns for entry in entries]
    looks = iter([False, False, False, True])
    assert start(tmp_path / "cut", config, lambda: next(looks, True)) is None
    start(tmp_path / "cut", config)
    shared = {**options, "teacher_cache": str(tmp_path / "whole" / runs.TEACHER)}
    start(tmp_path / "shared", config_of("off-policy", **shared))
    assert times == [entry.stat().st_mtime_ns for entry in entries]
    assert not (tmp_path / "shared" / runs.TEACHER).exists()
    for other in ("cut", "shared"):
        assert without_seconds(rows) == without_seconds(runs.read_attempts(tmp_path / other))
        assert without_seconds(metrics) == without_seconds(runs.read_self_metrics(tmp_path / other))
        same_adapters(tmp_path / "whole", tmp_path / other)


def same_adapters(*folders):
    one, two = (mx.load(str(f / "checkpoints/last/adapters.safetensors")) for f in folders)
    assert all(mx.array_equal(one[name], two[name]) for name in one)


def test_half_of_the_problems_are_the_experts(tmp_path):
    # So low a temperature that what is drawn does not depend on how many are drawn beside it.
    shared = {"episodes": 4, "batch_size": 4, "temperature": 0.01}
    summary = start(tmp_path / "run", config_of("gkd", **shared))
    # What the expert wrote counts in no number of the student's.
    assert summary["expert_answers"]["n"] == summary["attempts"]["n"] == 2
    assert summary["first_half"]["n"] + summary["second_half"]["n"] == 2
    by_expert = [row.get("by_expert") for row in runs.read_attempts(tmp_path / "run")]
    assert by_expert == [None, None, True, True]
    assert summary["health"]["first"]["tokens"] == sum(
        len(row["tokens"]) for row in runs.read_attempts(tmp_path / "run")[:2]
    )
    on = start(tmp_path / "on", config_of("on-policy", **shared))
    mixed, own = (
        [row["text"] for row in runs.read_lines(tmp_path / name / runs.ATTEMPTS)]
        for name in ("run", "on")
    )
    # The first two are the student's, the others the expert's.
    assert on and mixed[:2] == own[:2] and mixed[2:] != own[2:]


def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(UserError, match="--objective grpo has no expert"):
        make_plan(config_of("on-policy", objective="grpo"))
    with pytest.raises(UserError, match="thoughts are not kept for a second epoch"):
        make_plan(config_of("sft", epochs=2, expert_thinking="on"))
    with pytest.raises(UserError, match=r"--on-policy-fraction 0\.5 the student would answer"):
        make_plan(config_of("gkd", objective="likelihood"))
    # A policy loss learns from the student's own.
    assert make_plan(config_of("gkd", objective="likelihood", policy_weight=0.5, num_generations=2))
    with pytest.raises(UserError, match="likelihood is for what an expert wrote"):
        make_plan(configured("sdft", {"objective": "likelihood", "student": "tiny-student"}))


def test_the_command(tmp_path):
    mlx_fd = partial(shell, cwd=tmp_path)
    sizes = ["--episodes", 4, "--batch-size", 2, "--probe-size", 2, "--max-tokens", 12]
    done = mlx_fd("distil", "--expert", "tiny", *sizes, "--out", tmp_path / "run", "--json")
    assert done.status == 0, done.err
    assert "expert tiny, student tiny-student, method on-policy: objective reverse" in done.err
    readme = (tmp_path / "run" / "README.md").read_text()
    assert "`mlx-fd distil --config config.toml` repeats" in readme and "`teacher/`" in readme
    assert "self-" not in readme
    assert set(json.loads(done.out)["headroom"]) >= {"right", "expert"}
    again = mlx_fd(
        "distil", "--config", tmp_path / "run" / "config.toml", "--seed", 1, "--out", tmp_path / "b"
    )
    assert again.status == 0, again.err
    assert "expert 2, of 2 held-out problems" in again.out
    shown = mlx_fd("report", tmp_path / "run")
    assert shown.status == 0, shown.err
    exported = mlx_fd("export", tmp_path / "run", "--out", tmp_path / "exported", "--no-parity")
    assert exported.status == 0, exported.err
    card = (tmp_path / "exported" / "README.md").read_text()
    # Its card was that of a model that learned from itself.
    assert "| expert | `tiny` |" in card and "| student's base | `tiny-student` |" in card
    assert "on-policy: the student answers 100% of the problems" in card
    assert "itself" not in card and "critic" not in card
    wrong = mlx_fd("distil", "--expert", "tiny", "--method", "rcsd")
    assert wrong.status == 2 and "not one of 'on-policy', 'gkd'" in wrong.err
