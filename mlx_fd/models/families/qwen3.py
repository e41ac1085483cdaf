"""Qwen3: norms on queries and keys."""

from __future__ import annotations

from mlx_fd.models.families import Family, register_family

register_family(
    Family(name="qwen3", help="Qwen3", order=40, hf_class="Qwen3ForCausalLM", gguf="qwen3")
)
