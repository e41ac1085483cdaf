"""What mlx-fd estimates that a run needs, beside what real runs needed.

python scripts/bench_memory.py                    # every row that has none yet, to the JSONL file
python scripts/bench_memory.py --only NAME ...    # some rows, again
python scripts/bench_memory.py --table            # the table of docs/benchmarks.md, from the file

Each row is a whole `mlx-fd loop` in a process of its own, on models with random weights: one
batch of short problems, every text as long as it may be. "peak" is the most that MLX held
(mx.get_peak_memory), loading included; "resident" the most that the process had of the machine's
memory, Python and its libraries included, and what MLX or malloc keep of freed buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_fd.config import Config, override, to_toml  # noqa: E402
from mlx_fd.models.device_memory import available_memory  # noqa: E402
from mlx_fd.models.outline import build  # noqa: E402
from mlx_fd.runs.plan import make_plan  # noqa: E402
from support.tiny import make_tokenizer, write_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "bench_memory.jsonl"
_GIB, _MIB = 1 << 30, 1 << 20
# What a run may take of the memory that is free: other work goes on beside it.
_SHARE = 0.7

_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
_QWEN = {**_COMMON, "model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_05 = {
    **_QWEN,
    **{"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864},
    **{"num_attention_heads": 14, "num_key_value_heads": 2},
}
QWEN_15 = {
    **_QWEN,
    **{"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960},
    **{"num_attention_heads": 12, "num_key_value_heads": 2},
}


def _llama(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        **{"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers},
        **{"intermediate_size": 4 * hidden, "num_attention_heads": 8, "num_key_value_heads": 8},
        **{"vocab_size": 2048, "tie_word_embeddings": True, "torch_dtype": "float32"},
        **more,
    }


def _moe(layers: int) -> dict[str, Any]:
    return {
        **_llama(256, layers, model_type="qwen3_moe", num_key_value_heads=2, head_dim=64),
        **{"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    }


def _hybrid(layers: int) -> dict[str, Any]:
    return {
        **_llama(256, layers, model_type="lfm2", num_key_value_heads=2, norm_eps=1e-5),
        **{"conv_bias": False, "conv_L_cache": 3, "block_dim": 256, "block_ff_dim": 768},
        **{"block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0},
        **{"block_auto_adjust_ff_dim": False, "full_attn_idxs": list(range(1, layers, 3))},
    }


def _granite(hidden: int, layers: int) -> dict[str, Any]:
    return {
        **_llama(hidden, layers, model_type="granite", num_key_value_heads=4, vocab_size=30_000),
        **{"logits_scaling": 8.0, "attention_multiplier": 0.1, "embedding_multiplier": 12.0},
        **{"residual_multiplier": 0.22, "attention_bias": False, "mlp_bias": False},
    }


def _sliding(layers: int) -> dict[str, Any]:
    return {
        **_llama(256, layers, model_type="gemma3_text", num_key_value_heads=1, head_dim=64),
        **{"num_attention_heads": 4, "sliding_window": 64, "sliding_window_pattern": 6},
        **{"query_pre_attn_scalar": 64, "rope_local_base_freq": 1e4, "vocab_size": 32768},
    }


@dataclass(frozen=True)
class Row:
    """One (model, workload) pair.

    Attributes:
        what: in words.
        expert: its config.json.
        student: likewise; empty: the expert.
        options: of the run.
        held_out: the estimate's margins were not fitted to it.
    """

    what: str
    expert: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False


_SHORT = {"max_answer_tokens": 16, "max_feedback_tokens": 12, "max_merge_tokens": 8}
_LONG = {"max_answer_tokens": 48, "max_feedback_tokens": 40, "max_merge_tokens": 24}
ROWS = {
    "qwen2.5-1.5b-0.5b": Row(
        "Qwen2.5-1.5B teaches 0.5B, short texts",
        QWEN_15,
        QWEN_05,
        {**_SHORT, "batch_size": 2, "micro_batch": 2},
    ),
    "qwen2.5-0.5b": Row(
        "Qwen2.5-0.5B teaches itself, short texts",
        QWEN_05,
        options={**_SHORT, "batch_size": 2, "micro_batch": 1},
    ),
    "qwen2.5-0.5b-checkpointed": Row(
        "the same, micro-batches of 4, recomputed activations",
        QWEN_05,
        options={**_SHORT, "batch_size": 4, "micro_batch": 4, "grad_checkpoint": True},
    ),
    "activations": Row(
        "llama of 20M, large micro-batches",
        _llama(384, 8),
        options={**_LONG, "batch_size": 8, "micro_batch": 8},
    ),
    "activations-dora": Row(
        "the same with DoRA, recomputed activations",
        _llama(384, 8),
        options={
            **_LONG,
            **{"batch_size": 4, "micro_batch": 4, "train": "dora", "grad_checkpoint": True},
        },
    ),
    "caches": Row(
        "llama of 20M, many conversations",
        _llama(384, 8, intermediate_size=768),
        options={**_LONG, "batch_size": 32, "micro_batch": 1},
    ),
    "logits": Row(
        "llama with a vocabulary of 100,000",
        _llama(256, 4, vocab_size=100_000),
        options={**_LONG, "batch_size": 4, "micro_batch": 4},
    ),
    "full": Row(
        "llama of 50M teaches one of 20M, which trains whole",
        _llama(512, 12),
        _llama(384, 8),
        {**_SHORT, "batch_size": 4, "micro_batch": 1, "train": "full"},
    ),
    "moe": Row(
        "mixture of 32 experts (qwen3_moe) of 60M",
        _moe(8),
        options={**_LONG, "batch_size": 4, "micro_batch": 2},
    ),
    "moe-student": Row(
        "the same teaches a smaller one, LoRA on experts",
        _moe(8),
        _moe(4),
        {
            **_LONG,
            **{"batch_size": 4, "micro_batch": 2},
            "lora_keys": ["self_attn.q_proj", "mlp.switch_mlp.down_proj"],
        },
    ),
    "hybrid": Row(
        "convolutions and attention (lfm2)",
        _hybrid(12),
        options={**_LONG, "batch_size": 8, "micro_batch": 4},
    ),
    "sliding": Row(
        "sliding windows (gemma3_text)",
        _sliding(12),
        options={**_LONG, "batch_size": 8, "micro_batch": 2},
    ),
    "attention-loss": Row(
        "llama, attention loss",
        _llama(256, 6),
        options={
            **_LONG,
            **{"batch_size": 4, "micro_batch": 2, "losses": ["lm", "logit", "attention"]},
        },
    ),
    # What follows was written down before it was measured, and no rule was changed afterwards.
    "held-out-qwen3": Row(
        "qwen3 of 27M, long feedback, micro-batches of 3",
        _llama(320, 14, model_type="qwen3", num_key_value_heads=2, head_dim=48),
        options={
            **{"max_answer_tokens": 32, "max_feedback_tokens": 72, "max_merge_tokens": 40},
            **{"batch_size": 6, "micro_batch": 3},
        },
        held_out=True,
    ),
    "held-out-pair": Row(
        "granite of 24M teaches one of 10M, vocabulary of 30,000",
        _granite(384, 6),
        _granite(192, 9),
        {
            **{"max_answer_tokens": 64, "max_feedback_tokens": 20, "max_merge_tokens": 12},
            **{"batch_size": 12, "micro_batch": 2, "lora_rank": 24},
        },
        held_out=True,
    ),
    "held-out-full": Row(
        "olmo2 of 12M trains whole, recomputed activations",
        _llama(288, 10, model_type="olmo2", vocab_size=8192),
        options={
            **{"max_answer_tokens": 24, "max_feedback_tokens": 56, "max_merge_tokens": 16},
            **{"batch_size": 10, "micro_batch": 5, "train": "full", "grad_checkpoint": True},
        },
        held_out=True,
    ),
}


def _make_model(folder: Path, config: dict[str, Any]) -> Path:
    """A directory with random weights of a configuration's shapes."""
    tokenizer = make_tokenizer()
    write_tokenizer(folder, tokenizer)
    config = {**config, "eos_token_id": tokenizer.token_to_id("<|im_end|>")}
    mx.random.seed(0)
    weights = dict(tree_flatten(build(config).parameters()))
    names = sorted(weights)
    shard: dict[str, mx.array] = {}
    count = 0
    for name in names:
        shard[name] = weights.pop(name)
        mx.eval(shard[name])
        if sum(array.nbytes for array in shard.values()) > 512 * _MIB or name == names[-1]:
            count += 1
            file = folder / f"model-{count:05}.safetensors"
            mx.save_safetensors(str(file), shard, metadata={"format": "mlx"})
            shard = {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _config(row: Row, folder: Path) -> Config:
    expert = _make_model(folder / "expert", row.expert)
    student = _make_model(folder / "student", row.student) if row.student else expert
    problems = folder / "problems.jsonl"
    lines = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(200)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = row.options.get("batch_size", 8)
    given = {
        **{"expert": str(expert), "student": str(student), "problems": str(problems)},
        **{"episodes": batch, "probe_size": 1, "kd_steps": 1, "exam_size": 0},
        **{"gate": "always", "trigger": "always", "solutions": False},
        **row.options,
    }
    return override(Config(), given, "bench_memory")


def measure(name: str) -> dict[str, Any] | None:
    """One row, or ``None`` where there is not enough free memory for it."""
    row = ROWS[name]
    with TemporaryDirectory(prefix="mlx-fd-memory-") as place:
        folder = Path(place)
        config = _config(row, folder)
        estimate = make_plan(config).memory
        if estimate > _SHARE * available_memory():
            print(f"{name}: needs {estimate / _GIB:.1f} GiB, left out", file=sys.stderr)
            return None
        (folder / "config.toml").write_text(to_toml(config))
        command = [sys.executable, "-P", "-m", "mlx_fd", "loop"]
        command += ["--config", str(folder / "config.toml")]
        command += ["--out", str(folder / "run"), "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{name}: {' '.join(command)} ended with {process.returncode}")
        summary = json.loads((folder / "run" / "summary.json").read_text())
        peak = int(summary["peak_memory_bytes"])
        shutil.rmtree(folder / "run")
    return {
        "name": name,
        "what": row.what,
        "estimate_bytes": estimate,
        "peak_bytes": peak,
        "ratio": round(estimate / peak, 3),
        # Linux counts in KiB, macOS in bytes.
        "resident_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "device": backend().device,
        "machine": platform.machine(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _rows() -> dict[str, dict[str, Any]]:
    if not FILE.exists():
        return {}
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    return {row["name"]: row for row in rows}


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| pair and workload | estimate | peak of MLX | estimate / peak | resident |",
        "|---|---|---|---|---|",
    ]
    for name, row in _rows().items():
        what = f"{row['what']} (held out)" if ROWS[name].held_out else row["what"]
        sizes = [f"{row[key] / _MIB:,.0f} MiB" for key in ("estimate_bytes", "peak_bytes")]
        resident = f"{row['resident_bytes'] / _MIB:,.0f} MiB"
        lines.append(f"| {what} | {' | '.join(sizes)} | {row['ratio']:.2f} | {resident} |")
    return "\n".join(lines)


def main() -> None:
    """Measure rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    rows = _rows()
    for name in arguments.only or [name for name in ROWS if name not in rows]:
        found = measure(name)
        if found is None:
            continue
        print(f"{name}: {found['estimate_bytes']} / {found['peak_bytes']} = {found['ratio']}")
        rows[name] = found
        ordered = [rows[name] for name in ROWS if name in rows]
        FILE.write_text("".join(json.dumps(row) + "\n" for row in ordered))


if __name__ == "__main__":
    main()
