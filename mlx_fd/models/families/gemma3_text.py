"""Gemma 3, the language model: windows in five of six layers, norms that multiply by 1 + w."""

from __future__ import annotations

import math
from typing import Any

from mlx_fd.models.families import Family, Key, register_family

# Gemma 3 27B, the only one whose queries are not scaled by the size of a head.
_LAYERS_OF_27B = 62


def _scalar(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What llama.cpp divides the products of queries and keys by the root of."""
    return hidden // heads if layers == _LAYERS_OF_27B else head_dim


def check(args: Any) -> str | None:
    """How queries are scaled, which its files do not say."""
    expected = _scalar(
        args.num_hidden_layers, args.hidden_size, args.num_attention_heads, args.head_dim
    )
    if not math.isclose(args.query_pre_attn_scalar, expected):
        return (
            f"takes {expected:g} for query_pre_attn_scalar, and this model has "
            f"{args.query_pre_attn_scalar:g}"
        )
    return None


def complete(config: dict[str, Any]) -> None:
    """How queries are scaled."""
    config["query_pre_attn_scalar"] = _scalar(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["head_dim"],
    )


register_family(
    Family(
        name="gemma3_text",
        help="Gemma 3, its language model",
        order=60,
        hf_class="Gemma3ForCausalLM",
        gguf="gemma3",
        keys=(
            Key("attention.sliding_window", "sliding_window", int),
            Key("attention.sliding_window_pattern", "sliding_window_pattern", int, 6),
            Key("rope.freq_base_swa", "rope_local_base_freq", float, 10000.0),
        ),
        norm_shift=1.0,
        rope=frozenset({"default", "linear"}),
        check=check,
        complete=complete,
    )
)
