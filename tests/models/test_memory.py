"""The memory estimate against real runs, by their parts and as a whole."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402

from mlx_fd.config import Config, ModelOptions, override, preset  # noqa: E402
from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.feedback.pair import open_pair  # noqa: E402
from mlx_fd.models import cpu_math  # noqa: E402
from mlx_fd.models.loading import open_lazily  # noqa: E402
from mlx_fd.models.memory import (  # noqa: E402
    Needs,
    Workload,
    check_memory,
    estimate,
    largest_batch,
)
from mlx_fd.models.outline import build, cache_bytes, weight_bytes  # noqa: E402
from mlx_fd.models.resolve import resolve  # noqa: E402
from mlx_fd.models.student import prepare  # noqa: E402
from mlx_fd.runs.plan import make_plan, workload  # noqa: E402
from mlx_fd.training import loop  # noqa: E402
from mlx_fd.training.job import Job  # noqa: E402
from support import FIXTURES  # noqa: E402
from support.architectures import config_of, make_architecture  # noqa: E402
from support.draws import ALL  # noqa: E402
from support.tiny import make_model_dir  # noqa: E402

CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
FOUR_BIT = {"quantization": {"group_size": 64, "bits": 4}}
WORK = Workload(
    batch_size=8,
    micro_batch=4,
    prompt_tokens=400,
    later_tokens=200,
    max_answer_tokens=384,
    max_feedback_tokens=192,
)
GIB = 1 << 30
# Published widths, and few layers: a graph's size is that of its layers.
WIDE = {**CONFIGS["qwen2.5-1.5b"], "num_hidden_layers": 3}
NARROW = {**CONFIGS["qwen2.5-0.5b"], "num_hidden_layers": 3}


def student_of(config: dict[str, Any], **options: Any) -> Any:
    model = build(config)
    prepare(model, ModelOptions(**options))
    return model


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        # Activations, caches, what trains: each in turn is the largest.
        ({"hidden": 128, "intermediate": 512, "layers": 4}, {"batch_size": 2, "micro_batch": 2}),
        ({"hidden": 256, "layers": 4, "kv_heads": 4}, {"batch_size": 8, "micro_batch": 1}),
        ({"hidden": 256, "intermediate": 512}, {"batch_size": 2, "train": "full"}),
    ],
)
def test_a_run_needs_no_more_than_was_said_and_not_much_less(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any]
) -> None:
    """A whole batch of a real run, its models loaded: as `scripts/bench_memory.py` does it."""
    path = make_model_dir(tmp_path / "m", **shape)
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(40)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        **{"expert": str(path), "student": str(path), "problems": str(problems)},
        **{"episodes": options["batch_size"], "probe_size": 1, "exam_size": 0, "kd_steps": 1},
        **{"max_answer_tokens": 12, "max_feedback_tokens": 10, "max_merge_tokens": 8},
        **{"gate": "always", "trigger": "always", "lora_rank": 4},
        # Random weights are never right: there would be room for solutions, and none to learn from.
        **{"solutions": False},
        **options,
    }
    plan = make_plan(override(Config(), given, "test"))
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pair = open_pair(plan)
    from mlx_fd import runs

    folder = tmp_path / "run"
    runs.create(folder, "", plan.manifest)
    job = Job(folder, plan.config, plan.probe, plan.problems, lambda event: None)
    # The estimate counts all scores of an attention, as MLX makes them.
    with cpu_math.uninstalled():
        loop.run(job, pair)
    measured = mx.get_peak_memory() - before
    assert measured <= plan.memory <= 1.5 * measured, plan.memory / measured


def test_estimate_of_the_main_pair() -> None:
    """Qwen2.5 7B teaching 1.5B, both in 4 bits: what the parts must come to."""
    expert = build({**CONFIGS["qwen2.5-7b"], **FOUR_BIT})
    student = student_of({**CONFIGS["qwen2.5-1.5b"], **FOUR_BIT})
    found = estimate(expert, student, WORK)
    parts = found.parts
    assert parts["expert weights"] == weight_bytes(expert)
    assert 4.2e9 < parts["expert weights"] < 4.4e9
    assert 0.8e9 < parts["student weights"] < 0.9e9
    # LoRA of rank 16 on all seven matrices of 28 layers: 18.5 million numbers.
    assert parts["trained weights"] == 4 * (18_464_768 + 1536 * (3584 + 1))
    assert parts["optimizer"] == 2 * parts["trained weights"]
    assert found.total == sum(parts.values())
    shared = estimate(expert, student, dataclasses.replace(WORK, shared=True))
    assert shared.parts["student weights"] == 0


def test_caches_of_generation_are_counted() -> None:
    """The expert's copies of a conversation, where they are what is largest."""
    expert, student = build(NARROW), student_of(NARROW)
    work = dataclasses.replace(WORK, batch_size=512, micro_batch=1, prompt_tokens=40)
    # 3 layers x 2 heads x 64 x keys and values x 2 bytes, in steps of 256 tokens.
    token = 3 * 128 * 2 * 2
    assert work.expert_tokens == 40 + 200 + 3 * 384 + 3 * 192 == 1968
    assert cache_bytes(expert, 1968) == token * 2048
    # Without the last answer: the batch's, with room for more; what it goes on from; what is
    # kept of it; and the conversation that ended with the feedback.
    tokens = (1584 + 256) + 2 * 1584 + (40 + 384 + 192)
    caches = estimate(expert, student, work).parts["KV caches"]
    assert caches == pytest.approx(1.12 * 512 * token * tokens, rel=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 64},
        {"micro_batch": 8},
        {"prompt_tokens": 1200},
        {"max_answer_tokens": 768},
        {"max_feedback_tokens": 384},
        {"attention": True},
        {"solutions": True, "attention": True},
        {"attention": True, "head_by_head": True},
        {"remembered": 64},
    ],
)
def test_more_work_needs_more_memory(change: dict[str, Any]) -> None:
    expert, student = build(WIDE), student_of(NARROW)
    before = estimate(expert, student, WORK)
    assert estimate(expert, student, dataclasses.replace(WORK, **change)).total > before.total


def test_solutions_that_are_drawn_side_by_side_are_counted() -> None:
    """Of 257 the first is greedy and alone: 256 times as many conversations as are judged."""
    expert, student = build(WIDE), student_of(NARROW)
    plain = estimate(expert, student, WORK)
    for few in (1, 2):
        assert estimate(expert, student, dataclasses.replace(WORK, own_solutions=few)) == plain
    many = dataclasses.replace(WORK, own_solutions=257, question_tokens=150)
    found = estimate(expert, student, many)
    assert found.total - plain.total > 256 * 8 * cache_bytes(student, 150 + 384)
    largest = largest_batch(Needs(expert, student, many), many, found.total - 1)
    assert largest is not None and largest[0] == 7


def test_a_run_is_asked_for_its_solutions() -> None:
    questions = ["How many apples?", "How many apples does Tom have now?"]
    for disagreement, own in ((0.1, 17), (0.0, 0)):
        given = {"own_solutions": 17, "max_disagreement": disagreement}
        work = workload(resolve("tiny"), questions, override(Config(), given, "test"))
        assert work.own_solutions == own
        assert 0 < work.question_tokens < work.prompt_tokens


def test_recomputed_activations_need_less() -> None:
    expert, student = build(WIDE), student_of({**NARROW, "num_hidden_layers": 12})
    recomputed = dataclasses.replace(WORK, grad_checkpoint=True)
    totals = [estimate(expert, student, work).total for work in (recomputed, WORK)]
    assert totals[0] < 0.6 * totals[1]


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", *(["gemma3n", "mamba"] if ALL else [])])
def test_every_kind_of_model_has_an_estimate(name: str) -> None:
    """Recurrences, latent attention, blocks with weights of their own."""
    config = config_of(name)
    expert, student = build(config), student_of(config)
    small = dataclasses.replace(WORK, prompt_tokens=100, max_answer_tokens=30)
    found = estimate(expert, student, small)
    assert found.parts["expert weights"] == weight_bytes(expert)
    assert found.parts["activations"] > 2 * 4 * 100 * 64


def test_what_trains_needs_memory() -> None:
    expert = build(WIDE)

    def total(**options: Any) -> int:
        return estimate(expert, student_of(NARROW, **options), WORK).total

    assert total(lora_rank=8) < total(lora_rank=64) < total(train="full")
    assert total(lora_keys=("self_attn.q_proj",)) < total()


def test_largest_batch_is_the_largest() -> None:
    work = dataclasses.replace(WORK, batch_size=12, micro_batch=4)
    needs = Needs(build(WIDE), student_of(NARROW), work)
    low, high = needs.at(1, 1).total, needs.at(12, 4).total
    seen = set()
    for step in range(-1, 11):
        available = low + (high - low) * step // 10
        fitting = [
            (batch, micro)
            for micro in (1, 2, 4)
            for batch in range(1, 13)
            if needs.at(batch, micro).total <= available
        ]
        found = largest_batch(needs, work, available)
        assert found == (max(fitting) if fitting else None)
        seen.add(found)
    assert None in seen
    assert (12, 4) in seen
    assert len(seen) > 4


def test_check_memory_says_what_fits() -> None:
    expert, student = build(WIDE), student_of(NARROW)
    need = estimate(expert, student, WORK)
    assert check_memory(expert, student, WORK, need.total) == need
    with pytest.raises(
        UserError, match=r"It fits with --batch-size \d+ --micro-batch \d"
    ) as caught:
        check_memory(expert, student, WORK, need.total - 1)
    assert f"needs up to {need.total / GIB:.1f} GiB" in str(caught.value)
    assert f"expert weights {weight_bytes(expert) / GIB:.1f}" in str(caught.value)
    with pytest.raises(UserError, match="--preset 16gb"):
        check_memory(expert, student, WORK, weight_bytes(expert))


def test_a_mixture_of_experts_does_not_fit_where_its_weights_do_not() -> None:
    """An eighth of Qwen3-30B-A3B, which was let pass where it had less than its weights take."""
    experts = {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 6},
        **{"intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128},
        **{"num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"vocab_size": 151936, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
        **{"rope_theta": 1e6, "max_position_embeddings": 262144, "norm_topk_prob": True},
        **FOUR_BIT,
    }
    small = preset("16gb")
    work = Workload(
        batch_size=small.generation.batch_size,
        micro_batch=small.training.micro_batch,
        prompt_tokens=400,
        later_tokens=200,
        max_answer_tokens=small.generation.max_answer_tokens,
        max_feedback_tokens=small.generation.max_feedback_tokens,
        grad_checkpoint=small.training.grad_checkpoint,
    )
    student = student_of(NARROW, lora_rank=small.models.lora_rank)
    with pytest.raises(UserError, match=r"expert weights 2\.3.*No batch size makes it fit"):
        check_memory(build(experts), student, work, available=2 * GIB)
    # The weights of both, and what a batch of two needs.
    total = check_memory(build(experts), student, work, available=8 * GIB).total
    assert 2.5 * GIB < total < 6 * GIB


def test_models_that_ask_for_numbers_on_their_way_are_told_without_activations(
    tmp_path: Path,
) -> None:
    model, _ = open_lazily(make_architecture(tmp_path / "dbrx", "dbrx"))
    work = Workload(2, 1, prompt_tokens=40, max_answer_tokens=10, max_feedback_tokens=10)
    found = check_memory(model, model, work, 1 << 40)
    assert "cannot be told of these models" in found.note
    assert found.total >= found.parts["expert weights"] + found.parts["KV caches"]
    with pytest.raises(UserError, match="GiB are free"):
        check_memory(model, model, work, 1000)
