"""Qwen2 and Qwen2.5: biases on q, k and v."""

from __future__ import annotations

from mlx_fd.models.families import Family, register_family

register_family(
    Family(
        name="qwen2",
        help="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
        order=30,
        hf_class="Qwen2ForCausalLM",
        gguf="qwen2",
    )
)
