"""Phi-3 and Phi-4-mini: q, k and v in one matrix, gate and up in another."""

from __future__ import annotations

from typing import Any

from mlx_fd.models.families import Family, register_family


def complete(config: dict[str, Any]) -> None:
    """Its own entry for the context length before scaling."""
    scaling = config.get("rope_scaling") or {}
    config["original_max_position_embeddings"] = scaling.get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )


register_family(
    Family(
        name="phi3",
        help="Phi-3, Phi-4-mini",
        order=70,
        hf_class="Phi3ForCausalLM",
        gguf="phi3",
        rope=frozenset({"default", "linear", "longrope"}),
        complete=complete,
    )
)
