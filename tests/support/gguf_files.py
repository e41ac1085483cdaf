"""Random models in llama.cpp's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from support import tiny

HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 64, 4, 2, 96, 2
DIM = HIDDEN // HEADS
EPSILON, BASE = 1e-5, 10000.0


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    kind: Kind = Kind.F32,
    tied: bool = True,
    pre: str = "gpt-2",
    types: dict[str, int] | None = None,
    change: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    divisors: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a random model in llama.cpp's layout; returns its weights as the file holds them."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny.make_tokenizer(300)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(path, arch)
    entries: dict[str, tuple[Any, str]] = {
        f"{arch}.block_count": (LAYERS, "uint32"),
        f"{arch}.context_length": (512, "uint32"),
        f"{arch}.embedding_length": (HIDDEN, "uint32"),
        f"{arch}.feed_forward_length": (WIDE, "uint32"),
        f"{arch}.attention.head_count": (HEADS, "uint32"),
        f"{arch}.attention.head_count_kv": (KV_HEADS, "uint32"),
        f"{arch}.rope.freq_base": (BASE, "float32"),
        f"{arch}.attention.layer_norm_rms_epsilon": (EPSILON, "float32"),
        "tokenizer.ggml.model": ("gpt2", "string"),
        "tokenizer.ggml.pre": (pre, "string"),
        "tokenizer.ggml.tokens": (tokens, "array"),
        "tokenizer.ggml.token_type": (
            [(types or {}).get(t, 3 if t in tiny.SPECIAL else 1) for t in tokens],
            "array",
        ),
        "tokenizer.ggml.merges": ([" ".join(merge) for merge in model["merges"]], "array"),
        "tokenizer.ggml.bos_token_id": (tokens.index("<|endoftext|>"), "uint32"),
        "tokenizer.ggml.eos_token_id": (tokens.index("<|im_end|>"), "uint32"),
        "tokenizer.chat_template": (tiny.CHAT_TEMPLATE, "string"),
    }
    for key, value in (change or {}).items():
        entries[key] = value
    for key, (value, type_name) in entries.items():
        if key not in drop:
            getattr(writer, f"add_{type_name}")(key, value)

    stored: dict[str, np.ndarray] = {}

    def tensor(name: str, *shape: int, scale: float = 1.0) -> None:
        if name in drop:
            return
        data = (rng.standard_normal(shape) * scale).astype(np.float32)
        if len(shape) == 1:
            # Vectors stay float32 in GGUF; these are exact in 16 bits, as trained ones are.
            data = (1 + 0.1 * data).astype(np.float32)
            data = (data.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            writer.add_tensor(name, data)
            stored[name] = data.astype(np.float64)
            return
        if kind in (Kind.F32, Kind.F16):
            data = data.astype(np.float16 if kind == Kind.F16 else np.float32)
            writer.add_tensor(name, data)
            stored[name] = data.astype(np.float64)
            return
        raw = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(raw, kind).astype(np.float64)

    tensor("token_embd.weight", len(tokens), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    if not tied:
        tensor("output.weight", len(tokens), HIDDEN, scale=HIDDEN**-0.5)
    for i in range(LAYERS):
        for name, rows, cols in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", KV_HEADS * DIM, HIDDEN),
            ("attn_v", KV_HEADS * DIM, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", WIDE, HIDDEN),
            ("ffn_up", WIDE, HIDDEN),
            ("ffn_down", HIDDEN, WIDE),
        ):
            tensor(f"blk.{i}.{name}.weight", rows, cols, scale=cols**-0.5)
        tensor(f"blk.{i}.attn_norm.weight", HIDDEN)
        tensor(f"blk.{i}.ffn_norm.weight", HIDDEN)
        if arch == "qwen2":
            for name, rows in (("q", HIDDEN), ("k", KV_HEADS * DIM), ("v", KV_HEADS * DIM)):
                tensor(f"blk.{i}.attn_{name}.bias", rows)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
        stored["rope_freqs.weight"] = divisors.astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
