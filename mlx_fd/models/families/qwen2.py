"""Qwen2 and Qwen2.5: biases on q, k and v."""

from __future__ import annotations

from typing import Any

from mlx_fd.models.families import Family, register_family


def check(args: Any) -> str | None:
    """Rotation of neighbouring pairs."""
    if args.rope_traditional:
        return "rotates the halves of a head, and this model neighbouring pairs"
    return None


register_family(
    Family(
        name="qwen2",
        help="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
        order=30,
        hf_class="Qwen2ForCausalLM",
        gguf="qwen2",
        check=check,
    )
)
