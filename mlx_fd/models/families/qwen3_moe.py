"""Qwen3 with experts in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_fd.models.families import Family, Key, register_family

if TYPE_CHECKING:
    from mlx_fd.models.families import Weights


def to_hf(weights: Weights) -> Weights:
    """Each expert's matrices by themselves, as its checkpoints have them."""
    written = {}
    for name, array in weights.items():
        before, merged, part = name.partition(".switch_mlp.")
        if not merged:
            written[name] = array
            continue
        for expert in range(array.shape[0]):
            written[f"{before}.experts.{expert}.{part}"] = array[expert]
    return written


register_family(
    Family(
        name="qwen3_moe",
        help="Qwen3 with experts (30B-A3B, Coder)",
        order=50,
        hf_class="Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        keys=(
            Key("expert_count", "num_experts", int),
            Key("expert_used_count", "num_experts_per_tok", int),
            Key("expert_feed_forward_length", "moe_intermediate_size", int),
        ),
        constants={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        modules={".switch_mlp.": ".experts."},
        to_hf=to_hf,
        # PEFT takes those of a block without experts for parts of the experts' one tensor.
        not_in_peft=frozenset({"mlp.gate", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    )
)
