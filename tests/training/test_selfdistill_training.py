"""Whole runs of self-distillation on the tiny student: each method, resuming, the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fd import runs
from mlx_fd.config import Config, preset, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.export.exporter import export
from mlx_fd.export.form import Form
from mlx_fd.feedback.judge import give_feedback
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.writing import Sampling
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.runs.checkpoints import newest_checkpoint
from mlx_fd.runs.events import Note, Warned
from mlx_fd.runs.logs import log_size
from mlx_fd.training.job import Job
from mlx_fd.training.selfdistill import critics, rollouts
from mlx_fd.training.selfdistill.batch import Models, check_stats
from mlx_fd.training.selfdistill.combination import check_combination
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, Materials
from mlx_fd.training.selfdistill.methods import METHODS, configured
from mlx_fd.training.selfdistill.plan import make_plan, open_models
from mlx_fd.training.selfdistill.reading import forward_teacher_and_student
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats, Text
from mlx_fd.training.selfdistill.teacher import adapter, adapter_swapped, next_teacher, zero_adapter
from mlx_fd.training.selfdistill.training import run
from support.draws import ALL, by_day
from support.pairs import MEASURED, without_seconds
from support.shell import failed, launch, shell

SMALL = {
    "episodes": 4,
    "batch_size": 2,
    "max_answer_tokens": 64,
    "max_feedback_tokens": 40,
    "probe_size": 2,
    "probe_every": 2,
    "lora_rank": 2,
    "lora_rate": 1e-2,
    "critic": "truth",
    "student": "tiny-student",
    "seed": 2,
    "checkpoint_every": 2,
}


def config_of(method, **changes):
    small = dict(SMALL)
    if METHODS.get(method, {}).get("num_generations", 1) > 1:
        small["num_generations"] = 4
    return configured(method, {**small, **changes})


def start(folder, config, report=lambda event: None, stop=lambda: False):
    """Begin or resume a run in this process, as the command line does."""
    plan = make_plan(config)
    return begin(folder, plan, open_models(plan), report, stop)


def begin(folder, plan, models, report=lambda event: None, stop=lambda: False):
    """Begin or resume a planned run with models that were just opened."""
    with runs.locked(folder):
        if not runs.is_run(folder):
            runs.create(folder, to_toml(plan.config), plan.manifest)
        job = Job(folder, plan.config, plan.probe, plan.problems, report, stop)
        return run(job, models)


def rows(folder, name=runs.ATTEMPTS):
    return without_seconds(runs.read_lines(folder / name))


def weights(folder, which="last"):
    found = {}
    for path in sorted((folder / "checkpoints" / which).glob("*.safetensors")):
        found.update({f"{path.name}:{key}": np.array(v) for key, v in mx.load(str(path)).items()})
    return found


def assert_same(one, two):
    assert rows(one) == rows(two)
    assert rows(one, runs.METRICS) == rows(two, runs.METRICS)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    states = [
        json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
        for folder in (one, two)
    ]
    for state in states:
        for measured in MEASURED:
            del state[measured]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def opened():
    """The tiny student with an adapter that does something."""
    models = open_models(make_plan(config_of("grpo")))
    model = models.student_lm.model
    mx.random.seed(0)
    changed = [
        (name, 0.2 * mx.random.normal(value.shape) if name.endswith("lora_b") else value)
        for name, value in adapter(model).items()
    ]
    model.load_weights(changed, strict=False)
    return models


def test_methods_are_known_by_their_names():
    for name in METHODS:
        assert configured(name).selfdistill.method == name


def test_configurations_come_back_from_their_files(tmp_path):
    for name in METHODS:
        config = config_of(name)
        (tmp_path / "config.toml").write_text(to_toml(config))
        assert read(tmp_path / "config.toml") == config
    assert "selfdistill" not in to_toml(Config())
    with pytest.raises(UserError, match="there is no method 'gppo'"):
        configured("gppo")


def test_only_the_adapter_is_swapped(opened):
    model = opened.student_lm.model
    before = dict(tree_flatten(model.parameters()))
    own = adapter(model)
    base = zero_adapter(own)
    tokens = mx.array([[5, 9, 30, 7]])
    plain = model(tokens)
    with adapter_swapped(model, base):
        inside = dict(tree_flatten(model.parameters()))
        changed = {name for name in inside if inside[name] is not before[name]}
        assert changed == {name for name in own if name.endswith("lora_b")}
        # Not one weight of the base was copied.
        assert all(inside[name] is before[name] for name in before if name not in own)
        off = model(tokens)
    assert mx.array_equal(model(tokens), plain)
    assert float(mx.abs(off - plain).max()) > 0.1
    untouched = open_models(make_plan(config_of("grpo"))).student_lm.model
    assert mx.array_equal(off, untouched(tokens))
    with pytest.raises(RuntimeError, match="inside"), adapter_swapped(model, base):
        raise RuntimeError("inside")
    assert mx.array_equal(model(tokens), plain)


def test_teachers_follow_as_they_say(opened):
    model = opened.student_lm.model
    own = adapter(model)
    zero = {name: mx.zeros_like(value) for name, value in own.items()}
    options = config_of("sdpo", teacher_decay=0.75).selfdistill
    moved = next_teacher(zero, model, options, 1)
    for name, value in own.items():
        np.testing.assert_allclose(np.array(moved[name]), 0.25 * np.array(value), rtol=1e-6)
    snapshot = config_of("rlcsd", teacher_sync_steps=3).selfdistill
    assert next_teacher(zero, model, snapshot, 2) is zero
    assert all(next_teacher(zero, model, snapshot, 3)[name] is own[name] for name in own)
    assert next_teacher(zero, model, config_of("grpo").selfdistill, 9) is zero


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_prompt_is_read_once_for_its_attempts_and_log_probabilities_are_kept(opened, temperature):
    config = config_of("rlcsd", num_generations=5, temperature=temperature, generation_batch_size=8)
    plan = make_plan(config)
    student_lm = opened.student_lm
    groups, prefilled = rollouts.sample_rollouts(
        student_lm, plan.problems[:3], config, lambda n: 7 + n
    )
    assert [len(group) for group in groups] == [5, 5, 5]
    for group, problem in zip(groups, plan.problems, strict=False):
        assert {attempt.problem.id for attempt in group} == {problem.id}
        assert len({attempt.tokens for attempt in group}) > 1
    prompts = [len(first_prompt(student_lm, answer_prompt(p.question))) for p in plan.problems[:3]]
    # Of fifteen prompts, three, one of which two calls share.
    assert prefilled == sum(prompts)
    views = CONTEXTS["none"].views([a for group in groups for a in group], None)
    known = forward_teacher_and_student(
        student_lm, zero_adapter(adapter(student_lm.model)), groups, views, config.selfdistill, 4
    )
    for item in known:
        assert float(mx.abs(item.old - item.now).max()) < 1e-4
        assert (np.array(item.entropy) >= 0).all()


def test_sampling_is_cut_after_the_temperature():
    from mlx_fd.models.writing import _sampler

    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]] * 4000))
    mx.random.seed(1)
    # At temperature 2: 0.379, 0.294, 0.208, 0.120; the first two have 0.67, the first three 0.88.
    drawn = np.array(_sampler(Sampling(1, 2.0, top_p=0.7))(logprobs))
    shares = np.bincount(drawn, minlength=4) / 4000
    tempered = np.sqrt([0.5, 0.3, 0.15])
    np.testing.assert_allclose(shares[:3], tempered / tempered.sum(), atol=0.03)
    assert shares[3] == 0
    drawn = np.array(_sampler(Sampling(1, 1.0, top_k=2))(logprobs))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.625, 0.375], atol=0.03)


# What is kept from batch to batch only with other options than a short run has.
KEPT = {
    "sdpo": {"warmup_steps": 3},
    "resd": {"kd_steps": 2, "teacher_decay": 0.7, "critic": "self", "epochs": 2},
    "rlcsd": {"teacher_sync_steps": 2},
}


@pytest.mark.parametrize("method", by_day(METHODS, 3))
def test_each_method_trains_and_resumes_exactly(method, tmp_path):
    events = []
    folder, stopped = tmp_path / "whole", tmp_path / "stopped"
    small = {"episodes": 3, "batch_size": 1, "max_feedback_tokens": 24}
    # A reward wants answers that end.
    small["max_answer_tokens"] = 48 if method in ("grpo", "rlcsd") else 24
    config = config_of(method, **small, **KEPT.get(method, {}))
    plan = make_plan(config)
    models = open_models(plan)
    before = adapter(models.student_lm.model)
    summary = begin(folder, plan, models, events.append)
    found = rows(folder)
    attempts = 3 * config.selfdistill.num_generations * config.training.epochs
    assert [row["attempt"] for row in found] == list(range(attempts))
    assert summary["updates"]["steps"] >= 1 and summary["updates"]["skipped"] == 0
    after = weights(folder)
    assert any(
        not np.array_equal(after[f"adapters.safetensors:{name}"], np.array(value))
        for name, value in before.items()
    )
    for row in runs.read_lines(folder / runs.METRICS):
        for update in row["updates"]:
            assert math.isfinite(update["total"]) and update["gradient_norm"] > 0
            assert all(value is not None for value in update["losses"].values())
        assert row["attempts"]["logprob_gap"] < 1e-3
    taught = [row for row in found if row["teacher"] is not None]
    assert bool(taught) == (method != "grpo")
    assert all(0 <= row["negative_advantage"] <= 1 for row in taught)
    assert any(isinstance(e, Note) and e.text.startswith("headroom on 2") for e in events)
    assert summary["held_out"]["before"]["n"] == 2
    assert (folder / "checkpoints" / "best" / "adapter_config.json").exists()
    if not (ALL or method in KEPT or method == "grpo"):
        return  # of the others a checkpoint holds no more
    # Asked once before the first batch, then after each; there is no checkpoint of the first.
    answers = iter([False, True])
    assert begin(stopped, plan, open_models(plan), stop=lambda: next(answers)) is None
    assert begin(stopped, plan, open_models(plan)) is not None
    assert_same(folder, stopped)


def test_kill_9_at_random_moments_changes_nothing(tmp_path):
    """The command line, killed and resumed until it is through."""
    # The truth writes no feedback, so that a limit of it would be refused.
    given = {name: value for name, value in SMALL.items() if name != "max_feedback_tokens"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    options = [option.replace("--student=", "--model=") for option in options]
    options += ["--episodes=6", "--num-generations=2", "--max-answer-tokens=24"]
    begin = ("self-distill", "--method", "sdpo", *options, "--out")
    whole, target = tmp_path / "whole", tmp_path / "killed"
    done = shell(*begin, whole, cwd=tmp_path)
    assert done.status == 0, done.flat

    def go_on():
        return launch(*(("resume",) if runs.is_run(target) else begin), target, cwd=tmp_path)

    draw = np.random.default_rng(0)
    for name in ("headroom.json", runs.ATTEMPTS, *([runs.ATTEMPTS] if ALL else [])):
        before = log_size(target / name)
        running = go_on()
        while running.process.exitcode is None and log_size(target / name) <= before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        running.process.kill()
        done = running.wait()
        assert done.status == -signal.SIGKILL, done.flat
    done = go_on().wait()
    assert done.status == 0, done.flat
    assert "attempts right" in done.flat
    assert_same(whole, target)


def test_the_gate_ends_a_run_and_never_learns_nothing(tmp_path):
    summary = start(tmp_path / "never", config_of("step-critique", gate="never"))
    assert summary["updates"]["steps"] == 0
    assert not any(row["teaches"] for row in rows(tmp_path / "never"))
    events = []
    options = {"gate": "ema", "lora_rate": 0.0, "plateau_steps": 2, "minimum_gain": 0.0}
    config = config_of("step-critique", episodes=24, probe_every=1, **options)
    summary = start(tmp_path / "ema", config, events.append)
    # Nothing is learned at a rate of 0: a plateau, and the run ends before its problems do.
    assert summary["updates"]["batches"] < 12
    assert any(isinstance(e, Note) and e.text.startswith("the gate ends") for e in events)


def test_as_published_the_model_reflects_and_writes_rubrics_itself(tmp_path):
    for method, written in (("resd", critics.reflections), ("rcsd", critics.rubrics)):
        assert METHODS[method]["critic"] == "self"
        config = config_of(method, critic="self", episodes=6, batch_size=6, student="tiny-base")
        start(tmp_path / method, config)
        found = [row for row in rows(tmp_path / method) if row["note"]]
        itself = Materials(
            critic=load(resolve("tiny-base")),
            critic_sees=config.selfdistill.critic_sees,
            critic_tokens=config.generation.max_feedback_tokens,
        )
        problems = {problem.id: problem for problem in make_plan(config).problems}
        about = [
            problems[row["id"]]
            if method == "rcsd"
            else Attempt(problems[row["id"]], row["question"], (), row["text"], None, False)
            for row in found
        ]
        # Before its first update the self-teacher is the model as it was.
        assert found and [row["note"] for row in found] == written(about, itself)


def test_a_solution_is_shown_in_the_passes_after_the_one_that_found_it(tmp_path):
    small = {"student": "tiny-base", "episodes": 8, "batch_size": 4, "lora_rate": 0.0}
    start(tmp_path / "run", config_of("resd", critic="self", epochs=3, **small))
    found = rows(tmp_path / "run")
    assert [row["id"] for row in found[:8]] == [row["id"] for row in found[8:16]]
    shown, solved = 0, {}
    for begin in range(0, 24, 4):
        batch = found[begin : begin + 4]
        for row in batch:
            earlier = solved.get(row["id"])
            assert (earlier is not None) == ("An earlier solution" in (row["teacher"] or ""))
            shown += earlier is not None
            assert earlier is None or earlier in row["teacher"]
        solved |= {row["id"]: row["text"] for row in batch if row["correct"]}
    assert shown


def test_a_context_that_does_not_help_is_said_before_training(tmp_path):
    """The tiny student never read such a message."""
    events = []
    start(tmp_path / "run", config_of("rcsd", probe_size=6, episodes=2), events.append)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("with the context rubric" in text and "nothing to learn" in text for text in warned)
    headroom = json.loads((tmp_path / "run" / "headroom.json").read_text())
    assert headroom["taught"] == 6 and headroom["with_context"] <= headroom["without"]


@pytest.mark.parametrize(
    ("options", "starts"),
    by_day(
        [
            pytest.param({"checkpoint_every": 1}, 1, id="before a checkpoint"),
            pytest.param({"kd_steps": 2}, 1, id="in a batch"),
            # A resume ends as the run did.
            pytest.param({"episodes": 1}, 2, id="at the end"),
            pytest.param({"self_teacher": "ema"}, 1, id="in the next batch"),
        ]
    ),
)
def test_a_student_that_diverges_ends_the_run_with_a_message(tmp_path, options, starts):
    small = {"episodes": 2, "batch_size": 1, "probe_size": 1, "max_answer_tokens": 8}
    options = {**small, "checkpoint_every": 4, **options}
    config = config_of("step-critique", lora_rate=1e30, max_grad_norm=0.0, **options)
    wanted = r"diverged in batch 1: its .* not finite.* a lower learning rate \(--lora-rate 1e"
    for _ in range(starts):
        with pytest.raises(UserError, match=wanted):
            start(tmp_path / "run", config)
        assert newest_checkpoint(tmp_path / "run")[0].batch == 0


def test_a_teacher_whose_numbers_overflow_is_named():
    config, numbers = config_of("step-critique"), mx.array([-1.0, -2.0])
    stats = [RolloutStats(Text((1,), (2, 3)), 0, 0.0, True, *[numbers] * 3, numbers * math.nan)]
    with pytest.raises(UserError, match=r"teacher's .* not finite in batch 4, though it does"):
        check_stats(stats, 3, config)


def test_a_student_that_is_lost_without_a_nan_is_said(tmp_path):
    """At such a rate its final states are 0, and every token is as likely as any other."""
    events = []
    small = {"episodes": 2, "batch_size": 1, "probe_size": 1, "max_answer_tokens": 8}
    config = config_of("step-critique", lora_rate=1e9, num_generations=8, **small)
    start(tmp_path / "run", config, events.append)
    warned = [event.text for event in events if isinstance(event, Warned)]
    (found,) = [one for one in warned if "writes at random" in one]
    assert "an entropy of 6.10 nats, and no more than 6.10" in found
    assert "(--lora-rate 1e+09 may be too high)" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "full"}, "trains LoRA"),
        ({"objective": "grpo"}, "set --num-generations to 8"),
        ({"context": "sibling"}, "set --num-generations to 8"),
        ({"objective": "contrastive", "num_generations": 2}, "--context contrast"),
        ({"critic": ""}, "needs a critic"),
        ({"problems": "gsm8k"}, "truth is known for"),
        ({"gate": "published"}, "for the loop"),
        ({"policy_weight": 0.9}, "--policy-weight compares attempts at one problem"),
        ({"context": "none"}, "no more than the student, so that --objective forward has nothing"),
        ({"context": "none", "objective": "sampled", "self_teacher": "ema"}, "nothing to match"),
        ({"context": "clean"}, "and --noise is none, so that --objective forward has nothing"),
        ({"objective": "grpo", "reward_baseline": "group"}, "--reward-baseline to right"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_plan(config_of("step-critique", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"context": "clean", "noise": "typed"},
        # The base model holds back what a reward moves.
        {"context": "none", "policy_weight": 0.9, "num_generations": 2},
    ],
)
def test_what_has_something_to_learn_from_is_not_refused(changes):
    check_combination(config_of("step-critique", critic="", **changes))


def test_a_frozen_critic_shares_what_it_can(tmp_path):
    config = config_of("step-critique", critic="tiny", student="tiny-student")
    models = open_models(make_plan(config))
    assert isinstance(models, Models) and models.critic is not None
    assert models.critic.path != models.student_lm.path
    # The same model as critic and student: one set of base arrays, the critic without LoRA.
    models = open_models(make_plan(config_of("step-critique", critic="tiny", student="tiny")))
    theirs = {id(value) for _, value in tree_flatten(models.critic.model.parameters())}
    own = adapter(models.student_lm.model)
    ours = dict(tree_flatten(models.student_lm.model.parameters()))
    assert all(id(value) in theirs for name, value in ours.items() if name not in own)


def test_the_command_line_says_what_is_wrong(tmp_path):
    (tmp_path / "loop.toml").write_text(to_toml(Config()))
    (tmp_path / "self.toml").write_text(to_toml(config_of("grpo")))
    (tmp_path / "gkd.toml").write_text(to_toml(configured("gkd", {})))
    for arguments, wanted in (
        (["self-distill"], "choose a method: --method with one of grpo"),
        (["self-distill", "--method", "gppo"], "'gppo' is not one of 'grpo',"),
        (["self-distill", "--objective", "grpo"], "set --num-generations to 8"),
        (["self-distill", "--config", "loop.toml"], "mlx-fd loop --config loop.toml"),
        (["self-distill", "--config", "gkd.toml"], "mlx-fd distil --config gkd.toml"),
        (["distil", "--config", "self.toml"], "mlx-fd self-distill --config self.toml"),
        (["distil", "--config", "loop.toml"], "mlx-fd loop --config loop.toml"),
        (["loop", "--config", "self.toml"], "mlx-fd self-distill --config self.toml"),
        (["loop", "--config", "gkd.toml"], "mlx-fd distil --config gkd.toml"),
    ):
        failed(shell(*arguments, cwd=tmp_path), wanted)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that is done."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    # The limits that a tiny model is evaluated with outside a run.
    tiny = preset("tiny").generation
    limits = {
        "max_answer_tokens": tiny.max_answer_tokens,
        "max_feedback_tokens": tiny.max_feedback_tokens,
    }
    # One of the seeds whose best checkpoint is not the untrained one.
    longer = {"episodes": 6, "probe_size": 12, "lora_rate": 5e-3, "seed": 7}
    start(folder, config_of("step-critique", **limits, **longer))
    assert (folder / runs.CHECKPOINTS / "best").resolve().name != "000000"
    return folder


def test_another_seed_is_another_run(learned, tmp_path):
    start(tmp_path / "run", config_of("step-critique", seed=3, episodes=2))
    assert rows(tmp_path / "run") != rows(learned)[:2]


def test_what_learned_from_itself_is_exported_without_a_score_head(learned, tmp_path):
    form = Form(format="mlx", parity_problems=0)
    export(str(learned), tmp_path / "out", form, progress=lambda *step: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| method | step-critique: the teacher reads step-critique" in card
    assert "Held-out problems answered right" in card and "score_head" not in card
    assert not (tmp_path / "out" / "score_head.safetensors").exists()
    given = give_feedback(str(learned), "Tom has 3 apples and buys 5. How many?", "8", 16)
    assert given.head_score is None and given.text


def test_a_run_is_evaluated_beside_the_model_that_it_was(learned, tmp_path):
    adapter = shutil.copytree(learned / runs.CHECKPOINTS / "best", tmp_path / "adapter")
    folders = {
        str(learned): learned / "eval" / "fast",
        str(adapter): tmp_path / "alone",
        "tiny-student": tmp_path / "untrained",
    }
    said = {}
    for name, folder in folders.items():
        out = () if name == str(learned) else ("--out", str(folder))
        options = ("--limit", "8", "--quiet")
        done = shell("eval", name, *options, *out, "--cache", tmp_path / "cache", cwd=tmp_path)
        assert done.status == 0, done.err
        for line in (folder / "outputs.jsonl").read_text().splitlines():
            row = json.loads(line)
            said.setdefault((name, row["set"], row["system"]), []).append(row["turns"])
        if name == str(learned):
            assert "Student alone" in done.out and "Base model alone" in done.out
    solved, judged = "arithmetic/test", "arithmetic/first errors"
    ours = said[str(learned), solved, "student"]
    assert len(ours) == 8 and ours == said[str(adapter), solved, "student"]
    base = said[str(learned), solved, "base"]
    assert base != ours and base == said["tiny-student", solved, "student"]
    assert said[str(learned), judged, "clear"] == said["tiny-student", judged, "student"]
    assert said[str(learned), judged, "student"] == said[str(adapter), judged, "student"]
    scores = [
        row
        for row in map(json.loads, (learned / "eval/fast/outputs.jsonl").read_text().splitlines())
        if row["set"] == judged
    ]
    # No score head was trained: a score is what was written.
    assert scores and all(row["score"] == row["written_score"] for row in scores)


def test_a_run_meets_the_baselines_with_an_expert_that_is_named(learned, tmp_path):
    command = ("eval", str(learned), "--baselines", "--limit", "1", "--out", str(tmp_path / "out"))
    done = shell(*command, cwd=tmp_path)
    assert done.status == 2 and "name one with --expert" in done.err
    short = ("--cache", tmp_path / "cache", "--max-tokens", 16)
    done = shell(*command, "--expert", "tiny", "--json", *short, cwd=tmp_path)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert result["models"]["expert"]["name"] == "tiny"
    systems = [one["name"] for one in result["sets"][0]["systems"]]
    assert systems == ["student", "base", "clear", "cot", "cod", "self-refine", "expert"]


def test_stopping_is_for_runs_of_the_loop(learned, tmp_path):
    done = shell("pareto", learned, cwd=tmp_path)
    assert done.status == 2 and "runs of mlx-fd loop alone" in done.err
    assert "--config" not in done.err


def test_a_run_for_a_script_and_its_refused_resume(tmp_path):
    folder = tmp_path / "run"
    options = ["--episodes=2", "--batch-size=2", "--probe-size=2", "--lora-rank=2"]
    options += ["--max-answer-tokens=24"]
    done = shell(
        *("self-distill", "--context", "feedback", "--objective", "jsd", "--critic", "truth"),
        *(*options, "--json", "--out", folder),
        cwd=tmp_path,
    )
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert result["done"] and result["attempts"]["n"] == 2
    assert re.search(
        r"headroom on 2 held-out problems: \d right; \d with both right and "
        "wrong attempts",
        " ".join(done.err.split()),
    )
    config = (folder / "config.toml").read_text()
    assert 'method = "custom"' in config and 'student = "tiny-base"' in config
    (folder / "config.toml").write_text(
        config.replace('objective = "jsd"', 'objective = "forward"')
    )
    done = shell("resume", folder, cwd=tmp_path)
    assert done.status == 2
    assert "objective was 'jsd'" in done.err and "mlx-fd self-distill --config" in done.err


@pytest.mark.model
def test_smollm2_trains_on_real_problems(tmp_path):
    """A divergence over a real vocabulary."""
    easy = tmp_path / "easy.jsonl"
    asked = [{"question": f"What is {a} + {a + 1}?", "answer": f"{2 * a + 1}"} for a in range(1, 5)]
    easy.write_text("".join(json.dumps(row) + "\n" for row in asked))
    for method, changes in (("opsd-reference", {"num_generations": 1}),):
        given = {
            **{"student": "smollm2-135m:layers=2", "problems": str(easy)},
            **{"episodes": 2, "batch_size": 2},
            **{"max_answer_tokens": 8, "probe_size": 1, "lora_rank": 4, "temperature": 0.5},
            **changes,
        }
        summary = start(tmp_path / method, configured(method, given, preset="quick"))
        assert summary["attempts"]["logprob_gap"] < 1e-2
        assert summary["updates"]["skipped"] == 0
        # A policy learns where attempts at one problem differ in reward, and only there.
        taught = [row["lagging"] > 0 for row in rows(tmp_path / method, runs.METRICS)]
        assert summary["updates"]["steps"] == sum(taught)
        assert method == "grpo" or all(taught)
