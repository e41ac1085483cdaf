"""The memory estimate against real parameter counts and real peaks."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.models.backend import backend
from support import tiny

backend()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.models import llama, qwen2  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

from mlx_fd.errors import UserError  # noqa: E402
from mlx_fd.feedback.distill import make_optimizer, update  # noqa: E402
from mlx_fd.feedback.pair import open_pair  # noqa: E402
from mlx_fd.feedback.samples import Sample, read_text  # noqa: E402
from mlx_fd.losses.divergence import Target, fused_linear_divergences, one_hot  # noqa: E402
from mlx_fd.models import memory  # noqa: E402
from mlx_fd.models.conversation import Conversation  # noqa: E402
from mlx_fd.models.loading import load, load_pair  # noqa: E402
from mlx_fd.models.memory import (  # noqa: E402
    Workload,
    check_memory,
    estimate,
    largest_batch,
    parameters,
    weight_bytes,
)
from support import FIXTURES  # noqa: E402
from support.pairs import make_plan  # noqa: E402

CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
FOUR_BIT = {"quantization": {"group_size": 64, "bits": 4}}
WORK = Workload(
    batch_size=8, micro_batch=4, prompt_tokens=600, max_answer_tokens=384, max_feedback_tokens=192
)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # The sizes of the published checkpoints' tensors.
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_parameters_of_published_models(name: str, count: int) -> None:
    config = CONFIGS[name]
    assert parameters(config) == count
    module = {"llama": llama, "qwen2": qwen2}[config["model_type"]]
    before = mx.get_active_memory()
    model = module.Model(module.ModelArgs.from_dict(config))
    assert sum(v.size for _, v in tree_flatten(model.parameters())) == count
    assert mx.get_active_memory() - before < 1 << 20, "the weights are never made"
    assert weight_bytes(config, float32=True) == 4 * count
    assert weight_bytes(config) == 2 * count
    four_bit = weight_bytes({**config, **FOUR_BIT})
    assert 4.5 * count / 8 <= four_bit < 4.51 * count / 8


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantize", [None, (4, 64), (8, 32)])
def test_weight_bytes_are_those_of_the_file(
    tmp_path: Path, arch: str, tie: bool, quantize: tuple[int, int] | None
) -> None:
    path = tiny.make_model_dir(
        tmp_path / "m", arch=arch, tie=tie, quantize=quantize, dtype="float16", intermediate=192
    )
    config = json.loads((path / "config.json").read_text())
    stored = mx.load(str(path / "model.safetensors"))
    assert weight_bytes(config) == sum(array.nbytes for array in stored.values())
    size = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
    assert 0 <= size - weight_bytes(config) < 20_000


def test_head_dim_and_biases(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"head_dim": 24, "attention_bias": True, "mlp_bias": True}
    path = tiny.make_model_dir(tmp_path / "m", **extra)
    stored = mx.load(str(path / "model.safetensors"))
    config = json.loads((path / "config.json").read_text())
    assert parameters(config) == sum(array.size for array in stored.values())


def peak_of_a_batch(expert: Any, student: Any, work: Workload) -> int:
    """Peak memory of what an episode does, written down plainly: generation, then one update."""
    mx.reset_peak_memory()
    prompts = [[7] * work.prompt_tokens] * work.batch_size
    for loaded, length in ((expert, work.max_answer_tokens), (student, work.max_feedback_tokens)):
        batch_generate(loaded.model, loaded.tokenizer, prompts, max_tokens=length)
    tokens = mx.ones(
        (work.micro_batch, work.prompt_tokens + work.max_answer_tokens + work.max_feedback_tokens),
        dtype=mx.int32,
    )
    last, rows = work.max_feedback_tokens, work.micro_batch * work.max_feedback_tokens
    weights = mx.ones((rows,))
    expert_hidden = mx.stack([expert.model.model(row[None])[0, -last:] for row in tokens])
    mx.eval(expert_hidden)

    def loss(model: nn.Module) -> mx.array:
        head, other = model.model.embed_tokens, expert.model.model.embed_tokens
        vocab = head.weight.shape[0]
        hidden = model.model(tokens)[:, -last:].reshape(rows, -1)
        sure = one_hot(tokens[:, -last:].flatten())
        targets = [
            Target(sure, None, weights, "forward", 1.0, vocab),
            Target(expert_hidden.reshape(rows, -1), other, weights, "jsd", 1.0, vocab),
        ]
        return fused_linear_divergences(hidden, head, targets)[0]

    optimizer = optim.AdamW(1e-4)
    for _ in range(2):
        value, gradients = nn.value_and_grad(student.model, loss)(student.model)
        mx.eval(value, gradients)
        optimizer.update(student.model, gradients)
        mx.eval(student.model.parameters(), optimizer.state)
    return mx.get_peak_memory()


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        # Logits, activations and attention scores, caches: each in turn is the largest.
        ({"vocab_size": 20000, "hidden": 64, "layers": 2}, (4, 4, 24, 8, 48)),
        ({"hidden": 128, "intermediate": 512, "layers": 6}, (2, 4, 64, 48, 16)),
        ({"hidden": 128, "layers": 4, "kv_heads": 4}, (24, 1, 100, 24, 8)),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_estimates_are_above_real_peaks_but_not_far(
    tmp_path: Path, shape: dict[str, Any], lengths: tuple[int, ...], full: bool
) -> None:
    path = tiny.make_model_dir(tmp_path / "m", **shape)
    batch, micro, prompt, answer, feedback = lengths
    work = Workload(
        batch_size=batch,
        micro_batch=micro,
        prompt_tokens=prompt,
        max_answer_tokens=answer,
        max_feedback_tokens=feedback,
        train_full=full,
        on_cpu=True,
        float32=True,
        shared=not full,
    )
    gc.collect()
    start = mx.get_active_memory()
    if full:
        expert, student = load(path), load(path)
    else:
        expert, student = load_pair(path, path)
        student.model.freeze()
        layers = len(student.model.layers)
        linear_to_lora_layers(student.model, layers, {"rank": 16, "scale": 2.0, "dropout": 0.0})
    measured = peak_of_a_batch(expert, student, work) - start
    predicted = estimate(expert.config, student.config, work).total
    assert measured <= predicted < 5 * measured, predicted / measured


@pytest.mark.parametrize("heads", ["mean", "aligned"])
def test_the_experts_attention_of_all_samples_is_counted(tmp_path: Path, heads: str) -> None:
    """Feedback and solution of every episode of a batch, their maps kept until it has learned."""
    path = tiny.make_model_dir(tmp_path / "m", heads=16, kv_heads=16, layers=4, intermediate=64)
    batch, prompt, text = 8, 200, 120
    plan = make_plan(path, path, losses=("lm", "attention"), attention_heads=heads, micro_batch=2)
    options = plan.config.losses
    gc.collect()
    mx.clear_cache()
    start = mx.get_active_memory()
    pair = open_pair(plan)
    mx.reset_peak_memory()
    samples = []
    for number in range(2 * batch):
        before, target = (number + 5,) * prompt, (number + 6,) * text
        reading = read_text(pair, Conversation(), before, target, options)
        samples.append(Sample(before, target, reading, None))
    optimizer = make_optimizer(pair.student, plan.config.training)
    weights = {"lm": 1.0, "attention": 1.0}
    update(pair, optimizer, samples, weights, options, plan.config.training)
    measured = mx.get_peak_memory() - start
    work = Workload(
        batch_size=batch,
        micro_batch=2,
        prompt_tokens=prompt - text,
        max_answer_tokens=text,
        max_feedback_tokens=text,
        on_cpu=True,
        float32=True,
        shared=True,
        solutions=True,
        attention=True,
        head_by_head=heads == "aligned",
    )
    predicted = estimate(pair.expert.config, pair.expert.config, work).total
    assert measured <= predicted < 5 * measured, predicted / measured


def test_estimate_of_the_main_pair() -> None:
    """Qwen2.5 7B teaching 1.5B, both in 4 bits: what the parts must come to."""
    expert, student = ({**CONFIGS[n], **FOUR_BIT} for n in ("qwen2.5-7b", "qwen2.5-1.5b"))
    parts = estimate(expert, student, WORK).parts
    assert parts["expert weights"] == weight_bytes(expert)
    assert 4.2e9 < parts["expert weights"] < 4.4e9
    assert 0.8e9 < parts["student weights"] < 0.9e9
    # 28 layers x 4 heads x 128 x keys and values x 2 bytes for the expert, half the heads for the
    # student; 1944 and 1176 tokens in steps of 256; 8 conversations, held three times.
    token = 28 * 128 * 2 * 2
    assert parts["KV caches"] == 24 * token * (4 * 2048 + 2 * 1280)
    # The losses keep to their budget, whatever the batch.
    assert 512 * 2**20 <= parts["logits"] < 600 * 2**20
    total = estimate(expert, student, WORK)
    assert total.total == sum(parts.values())
    shared = estimate(expert, expert, dataclasses.replace(WORK, shared=True))
    assert shared.parts["student weights"] == 0
    known = estimate(expert, student, dataclasses.replace(WORK, expert_bytes=5, student_bytes=7))
    assert (known.parts["expert weights"], known.parts["student weights"]) == (5, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 16},
        {"micro_batch": 8},
        {"prompt_tokens": 1200},
        {"max_answer_tokens": 768},
        {"max_feedback_tokens": 384},
        {"lora_rank": 64},
        {"attention": True},
        {"solutions": True, "attention": True},
        {"attention": True, "head_by_head": True},
        {"train_full": True},
        {"on_cpu": True},
        {"float32": True},
    ],
)
def test_more_work_needs_more_memory(change: dict[str, Any]) -> None:
    pair = CONFIGS["qwen2.5-1.5b"], CONFIGS["qwen2.5-0.5b"]
    assert estimate(*pair, dataclasses.replace(WORK, **change)).total > estimate(*pair, WORK).total
    recomputed = dataclasses.replace(WORK, grad_checkpoint=True)
    assert estimate(*pair, recomputed).total < estimate(*pair, WORK).total


def test_largest_batch_is_the_largest() -> None:
    pair = CONFIGS["qwen2.5-1.5b"], CONFIGS["qwen2.5-0.5b"]
    work = dataclasses.replace(WORK, batch_size=64, micro_batch=8)
    seen = set()
    for available in range(4 * GIB, 90 * GIB, 3 * GIB):
        found = largest_batch(*pair, work, available)
        fitting = [
            (batch, micro)
            for micro in (1, 2, 4, 8)
            for batch in range(1, 65)
            if estimate(*pair, dataclasses.replace(work, batch_size=batch, micro_batch=micro)).total
            <= available
        ]
        got = (found.batch_size, found.micro_batch) if found else None
        assert got == (max(fitting) if fitting else None)
        seen.add(got)
    assert None in seen
    assert (64, 8) in seen
    assert len(seen) > 6


def test_check_memory_says_what_fits() -> None:
    expert, student = ({**CONFIGS[n], **FOUR_BIT} for n in ("qwen2.5-7b", "qwen2.5-1.5b"))
    need = estimate(expert, student, WORK)
    assert check_memory(expert, student, WORK, need.total) == need
    with pytest.raises(
        UserError, match=r"It fits with --batch-size \d+ --micro-batch \d"
    ) as caught:
        check_memory(expert, student, WORK, need.total - 1)
    assert f"needs up to {need.total / GIB:.1f} GiB" in str(caught.value)
    assert "expert weights 4.0" in str(caught.value)
    with pytest.raises(UserError, match="--preset 16gb"):
        check_memory(expert, student, WORK, 4 * GIB)
    with pytest.raises(UserError, match="no 'intermediate_size'"):
        check_memory({k: v for k, v in expert.items() if k != "intermediate_size"}, student, WORK)


def test_linux_memory_and_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:       24684084 kB\nMemAvailable:   8388608 kB\nHugePages_Total:   0\n"
    )
    assert memory._linux_available(tmp_path) == 8 * GIB
    new = tmp_path / "sys/fs/cgroup"
    new.mkdir(parents=True)
    (new / "memory.current").write_text(f"{3 * GIB}\n")
    (new / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    (new / "memory.max").write_text("max\n")
    assert memory._linux_available(tmp_path) == 8 * GIB
    (new / "memory.max").write_text(f"{6 * GIB}\n")
    assert memory._linux_available(tmp_path) == 4 * GIB
    (new / "memory.max").write_text(f"{60 * GIB}\n")
    assert memory._linux_available(tmp_path) == 8 * GIB
    (new / "memory.max").unlink()
    old = new / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (old / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (old / "memory.stat").write_text(f"total_inactive_file {GIB // 2}\n")
    assert memory._linux_available(tmp_path) == GIB * 3 // 2


def test_available_memory_is_plausible() -> None:
    assert 1 << 27 < memory.available_memory() < 1 << 45
