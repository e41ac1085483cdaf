"""What an exported student takes on a phone: file and memory, computed, not measured.

    python scripts/edge_budget.py --context 2048

Weights are counted from the shapes of mlx-lm's model of each configuration, with the bytes that
GGUF's types have (32 numbers of Q4_0 in 18, of Q8_0 in 34; vectors in float32). Memory is weights
and a cache in float16 of ``--context`` tokens; what an engine computes with beside them (some tens
of MiB) and the tokenizer (some MB of the file) are left out. No weight is read, so any
configuration can be named: ``--config PATH``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mlx_fd.models.backend import backend

backend()

from mlx.utils import tree_flatten  # noqa: E402

from mlx_fd.models.outline import build  # noqa: E402

# Bytes of 32 numbers.
TYPES = {"f16": 64, "q8_0": 34, "q4_0": 18}
_FLOAT32, _FLOAT16 = 4, 2
_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}


def _config(kind: str, layers: int, width: int, heads: int, kv: int, inner: int, vocab: int) -> Any:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        **_COMMON,
    }


# As their config.json has it.
MODELS = {
    "SmolLM2-135M": _config("llama", 30, 576, 9, 3, 1536, 49152),
    "Qwen2.5-0.5B": _config("qwen2", 24, 896, 14, 2, 4864, 151936),
    "Llama-3.2-1B": _config("llama", 16, 2048, 32, 8, 8192, 128256),
    "Qwen2.5-1.5B": _config("qwen2", 28, 1536, 12, 2, 8960, 151936),
}


def budget(config: dict[str, Any], context: int) -> dict[str, Any]:
    """Parameters, bytes of weights by type, and bytes of a cache.

    Args:
        config: as ``config.json``; how its weights are quantised does not matter.
        context: tokens in the cache.
    """
    plain = {name: v for name, v in config.items() if not name.startswith("quantization")}
    shapes = [array.shape for _, array in tree_flatten(build(plain).parameters())]
    matrices = sum(_size(shape) for shape in shapes if len(shape) > 1)
    vectors = sum(_size(shape) for shape in shapes if len(shape) == 1)
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kept = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
    return {
        "parameters": matrices + vectors,
        "weights": {
            kind: matrices * size // 32 + vectors * _FLOAT32 for kind, size in TYPES.items()
        },
        "cache": kept * context * _FLOAT16,
        "head": (config["hidden_size"] + 1) * _FLOAT32,
    }


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="PATH")
    args = parser.parse_args()
    models = dict(MODELS) if not args.config else {}
    for path in args.config:
        models[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    print("| | parameters | " + " | ".join(f"{kind} file, MB" for kind in TYPES), end=" | ")
    print(f"cache of {args.context} tokens, MB | memory with q4_0, MB |")
    print("|---|" + "--:|" * (len(TYPES) + 3))
    for name, config in models.items():
        found = budget(config, args.context)
        files = " | ".join(f"{size / 1e6:,.0f}" for size in found["weights"].values())
        memory = found["weights"]["q4_0"] + found["cache"]
        print(
            f"| {name} | {found['parameters'] / 1e6:,.0f} M | {files} | {found['cache'] / 1e6:,.0f}"
            f" | {memory / 1e6:,.0f} |"
        )


if __name__ == "__main__":
    main()
