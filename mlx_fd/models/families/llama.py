"""Llama, and what is built like it."""

from __future__ import annotations

from typing import Any

from mlx_fd.models.families import Family, neighbouring_pairs, register_family


def no_windows(args: Any) -> str | None:
    """Whether a layer attends to a window only."""
    if "sliding_attention" in (getattr(args, "layer_types", None) or ()):
        return "attends to all tokens in every layer, and this model to a window in some"
    return None


def check(args: Any) -> str | None:
    """A window, or rotation of neighbouring pairs."""
    return neighbouring_pairs(args) or no_windows(args)


register_family(
    Family(
        name="llama",
        help="Llama, SmolLM2, DeepSeek-R1-Distill-Llama",
        order=10,
        hf_class="LlamaForCausalLM",
        gguf="llama",
        biases={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"},
        pairs=True,
        rope=frozenset({"default", "linear", "llama3", "yarn"}),
        check=check,
        check_hf=check,
    )
)
