"""How much memory a run needs, from the two models' configurations alone, and how much there is.

The estimate errs on the high side on purpose: a run that is refused can be made smaller at once,
one that dies after an hour cannot. Its coefficients were measured (``tests/models/test_memory.py``
compares it with real updates).
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend

# Bytes that the logits and what is made of them may take at a time in the losses.
LOGIT_BUDGET = 512 << 20
_GIB = 1 << 30
# Floats that a block keeps for its backward pass, for each token: of its width, of its MLP's
# width, of its queries, keys and values. Measured 4.5, 5.5 and 2.7 on blocks with LoRA everywhere.
_KEPT_HIDDEN, _KEPT_MLP, _KEPT_HEADS = 6, 7, 3
# Copies of [heads, tokens, tokens] a block keeps where attention is not fused: 1.5 measured.
_KEPT_SCORES = 2
# Likewise where the attention loss is in use, of each head, text token and key.
_KEPT_ATTENTION = 4
# Float32 [tokens, vocabulary] that the losses take at a time, within the budget, and those of the
# few rows that stay in a CPU's cache.
_LOGIT_ARRAYS, _CACHED_ARRAYS, _CACHED_BYTES = 6, 16, 32 << 20
# Of what is generated, for each conversation.
_DRAWN_ARRAYS = 4
# Conversations keep their caches while the generator works on copies.
_CACHE_COPIES = 3
_CACHE_STEP = 256


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run, beside the models.

    Attributes:
        batch_size: conversations at once.
        micro_batch: samples of a distillation step at once.
        prompt_tokens: of all that a conversation's prompts say (problem and instructions).
        max_answer_tokens: most tokens of an answer.
        max_feedback_tokens: most tokens of a feedback.
        solutions: answers are learned from, too.
        lora_rank: rank of the LoRA matrices, on every linear layer.
        train_full: the whole student trains instead of LoRA.
        grad_checkpoint: activations are recomputed.
        on_cpu: float32 activations and attention that is not fused.
        float32: the weights are dequantised to float32.
        shared: the student's base weights are the expert's arrays.
        attention: the attention loss is in use.
        head_by_head: it compares head by head, not the means over heads.
        expert_bytes: size of the expert's weights in memory where it is known better than from
            its configuration.
        student_bytes: likewise the student's.
    """

    batch_size: int
    micro_batch: int
    prompt_tokens: int
    max_answer_tokens: int
    max_feedback_tokens: int
    lora_rank: int = 16
    train_full: bool = False
    grad_checkpoint: bool = False
    on_cpu: bool = False
    float32: bool = False
    shared: bool = False
    solutions: bool = False
    attention: bool = False
    head_by_head: bool = False
    expert_bytes: int | None = None
    student_bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes.

    Attributes:
        parts: what the memory is for -> bytes.
        total: their sum.
    """

    parts: dict[str, int]
    total: int


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _matrices(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int, bool]]:
    """(module, outputs, inputs, has a bias) of every matrix of a llama or qwen2 model."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * _head_dim(config)
    key = _kv_heads(config) * _head_dim(config)
    qwen2 = config.get("model_type") == "qwen2"
    bias = bool(config.get("attention_bias", False))
    yield "model.embed_tokens", config["vocab_size"], hidden, False
    # Both of mlx-lm's classes tie the embeddings where the configuration does not say.
    if not config.get("tie_word_embeddings", True):
        yield "lm_head", config["vocab_size"], hidden, False
    mlp_bias = bool(config.get("mlp_bias", False))
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield f"{block}.self_attn.q_proj", query, hidden, qwen2 or bias
        yield f"{block}.self_attn.k_proj", key, hidden, qwen2 or bias
        yield f"{block}.self_attn.v_proj", key, hidden, qwen2 or bias
        yield f"{block}.self_attn.o_proj", hidden, query, bias
        yield f"{block}.mlp.gate_proj", wide, hidden, mlp_bias
        yield f"{block}.mlp.up_proj", wide, hidden, mlp_bias
        yield f"{block}.mlp.down_proj", hidden, wide, mlp_bias


def _vector_parameters(config: Mapping[str, Any]) -> int:
    norms = (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    return int(norms + sum(rows for _, rows, _, bias in _matrices(config) if bias))


def parameters(config: Mapping[str, Any]) -> int:
    """Number of a llama or qwen2 model's parameters, tied embeddings counted once."""
    return _vector_parameters(config) + sum(rows * cols for _, rows, cols, _ in _matrices(config))


def weight_bytes(config: Mapping[str, Any], *, float32: bool = False) -> int:
    """Memory of a model's weights.

    Args:
        config: an mlx-lm configuration of the llama or qwen2 kind.
        float32: everything is dequantised to float32.

    Returns:
        Bytes: as stored on the disk, or 4 for each parameter.
    """
    if float32:
        return 4 * parameters(config)
    quantization = config.get("quantization") or {}
    plain = 4 if (config.get("torch_dtype") or config.get("dtype")) == "float32" else 2
    total = plain * _vector_parameters(config)
    for module, rows, cols, _ in _matrices(config):
        how = quantization.get(module, quantization)
        if not how:
            total += plain * rows * cols
        else:
            # A 16-bit scale and a 16-bit bias for each group.
            total += rows * cols * how["bits"] // 8 + 4 * rows * cols // how["group_size"]
    return int(total)


def _cache_bytes(config: Mapping[str, Any], tokens: int, width: int) -> int:
    """Keys and values of one conversation; caches grow in steps."""
    rounded = -(-tokens // _CACHE_STEP) * _CACHE_STEP
    layers = config["num_hidden_layers"]
    return int(2 * layers * _kv_heads(config) * _head_dim(config) * rounded * width)


def _kept_per_token(config: Mapping[str, Any], tokens: int, scores: bool) -> int:
    """Floats that one block keeps for each token of a sequence of ``tokens``."""
    heads = config["num_attention_heads"]
    return int(
        _KEPT_HIDDEN * config["hidden_size"]
        + _KEPT_MLP * config["intermediate_size"]
        + _KEPT_HEADS * (heads + 2 * _kv_heads(config)) * _head_dim(config)
        + (_KEPT_SCORES * heads * tokens if scores else 0)
    )


def estimate(expert: Mapping[str, Any], student: Mapping[str, Any], work: Workload) -> Memory:
    """Most memory that a run needs, estimated on the high side.

    Args:
        expert: the expert's config.json.
        student: the student's.
        work: batch sizes, lengths and what trains.

    Returns:
        Expert and student weights, KV caches, activations (of the hungrier of generation and
        distillation), logits, and what the optimiser needs.
    """
    # LoRA's products are float32 beside the model's 16-bit activations: 3 is between the two.
    width = 4 if work.on_cpu or work.float32 else 3
    cache_width = 4 if work.on_cpu or work.float32 else 2
    # A conversation holds two answers and three texts of a feedback's length; the student reads
    # the first answer and one feedback.
    student_tokens = work.prompt_tokens + work.max_answer_tokens + work.max_feedback_tokens
    expert_tokens = student_tokens + work.max_answer_tokens + 2 * work.max_feedback_tokens
    caches = work.batch_size * _CACHE_COPIES
    caches *= _cache_bytes(expert, expert_tokens, cache_width) + _cache_bytes(
        student, student_tokens, cache_width
    )

    # Generation holds one block's working set at a time, for as many tokens as a prompt has.
    prompt = max(work.prompt_tokens, work.max_feedback_tokens)
    generating = max(
        work.batch_size * prompt * width * _kept_per_token(model, tokens, work.on_cpu)
        for model, tokens in ((expert, expert_tokens), (student, student_tokens))
    )
    per_block = width * _kept_per_token(student, student_tokens, work.on_cpu)
    blocks = student["num_hidden_layers"]
    kept = per_block * blocks
    if work.grad_checkpoint:
        kept = per_block + 2 * width * student["hidden_size"] * blocks
    training = work.micro_batch * student_tokens * kept

    text = max(work.max_feedback_tokens, work.max_answer_tokens if work.solutions else 0)
    row = 4 * max(expert["vocab_size"], student["vocab_size"])
    rows = work.micro_batch * text
    logits = max(
        min(rows * row * _LOGIT_ARRAYS, LOGIT_BUDGET)
        + min(rows * row * _CACHED_ARRAYS, _CACHED_BYTES),
        work.batch_size * row * _DRAWN_ARRAYS,
    )
    if work.attention:
        # Of each sample the expert's, too, while the batch lasts: the heads that are compared.
        heads = student["num_attention_heads"]
        maps = work.micro_batch * heads * _KEPT_ATTENTION
        maps += 2 * work.batch_size * (heads if work.head_by_head else 1)
        training += 4 * blocks * maps * text * student_tokens

    rank = work.lora_rank
    matrices = [(rows, cols) for name, rows, cols, _ in _matrices(student) if "layers." in name]
    trained = sum(rank * (rows_ + cols) for rows_, cols in matrices)
    if work.train_full:
        trained = parameters(student)
    trained += student["hidden_size"] * (expert["hidden_size"] + 1)

    expert_bytes = work.expert_bytes or weight_bytes(expert, float32=work.float32)
    student_bytes = work.student_bytes or weight_bytes(student, float32=work.float32)
    parts = {
        "expert weights": expert_bytes,
        "student weights": 0 if work.shared else student_bytes,
        "KV caches": caches,
        "activations": max(generating, training),
        "logits": logits,
        # Weight, gradient and its accumulation, AdamW's two moments, all in float32.
        "optimizer": trained * 4 * 5,
    }
    return Memory(parts, sum(parts.values()))


def _cgroup_free(root: Path) -> int | None:
    """Memory that the control group still allows, or ``None`` where it sets no limit."""
    files = (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    for folder, limit_file, used_file, cache_key in files:
        try:
            limit = int((root / folder / limit_file).read_text())
            used = int((root / folder / used_file).read_text())
            stat = (root / folder / "memory.stat").read_text()
        except (OSError, ValueError):
            # Missing, or "max": no limit of this kind.
            continue
        # File cache is given back when memory is needed.
        cached = dict(line.split() for line in stat.splitlines()).get(cache_key, 0)
        return max(0, limit - used + int(cached))
    return None


def _linux_available(root: Path = Path("/")) -> int:
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = 1024 * int(meminfo["MemAvailable"].split()[0])
    limit = _cgroup_free(root)
    return available if limit is None else min(available, limit)


def available_memory() -> int:
    """Bytes that MLX can use now.

    Returns:
        Metal: the working set that the system recommends. CUDA: the device's free memory. Else:
        what the machine and its control group have left.
    """
    device = backend().device
    if device != "cpu":
        import mlx.core as mx

        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "free_memory", "memory_size"):
            if key in info:
                return int(info[key])
    if sys.platform == "linux":
        return _linux_available()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest_batch(
    expert: Mapping[str, Any], student: Mapping[str, Any], work: Workload, available: int
) -> Workload | None:
    """The largest batch sizes, up to those asked for, that fit.

    Args:
        expert: the expert's config.json.
        student: the student's.
        work: what is asked for.
        available: bytes that the run may take.

    Returns:
        ``work`` with the largest ``batch_size``, and for it the largest ``micro_batch`` (from
        halving); ``None`` where not even one conversation fits.
    """
    best: Workload | None = None
    micro = work.micro_batch
    while micro >= 1:
        low, high = 0, work.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            fits = dataclasses.replace(work, batch_size=middle, micro_batch=micro)
            if estimate(expert, student, fits).total <= available:
                low = middle
            else:
                high = middle - 1
        if low > (best.batch_size if best else 0):
            best = dataclasses.replace(work, batch_size=low, micro_batch=micro)
        micro //= 2
    return best


def check_memory(
    expert: Mapping[str, Any],
    student: Mapping[str, Any],
    work: Workload,
    available: int | None = None,
) -> Memory:
    """Make sure that a run fits before anything is loaded.

    Args:
        expert: the expert's config.json.
        student: the student's.
        work: what is asked for.
        available: bytes; ``None`` asks ``available_memory``.

    Returns:
        The estimate.

    Raises:
        UserError: it does not fit; the message says what is needed and what would fit. Or a
            configuration is of another kind of model.
    """
    if available is None:
        available = available_memory()
    try:
        memory = estimate(expert, student, work)
    except KeyError as error:
        raise UserError(
            f"config.json has no {error}: this is not a model of the llama or qwen2 kind"
        ) from error
    if memory.total <= available:
        return memory
    largest = sorted(memory.parts.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in largest)
    message = (
        f"this run needs up to {memory.total / _GIB:.1f} GiB ({shares}) "
        f"and {available / _GIB:.1f} GiB are free."
    )
    smaller = largest_batch(expert, student, work, available)
    if smaller is not None:
        raise UserError(
            f"{message} It fits with --batch-size {smaller.batch_size} "
            f"--micro-batch {smaller.micro_batch}."
        )
    raise UserError(
        f"{message} No batch size makes it fit: try --preset 16gb, shorter --max-answer-tokens and "
        "--max-feedback-tokens, --grad-checkpoint, a 4-bit expert, or a smaller expert."
    )
