"""SmolLM3: a Llama with every fourth layer without rotary positions."""

from __future__ import annotations

from typing import Any

from mlx_fd.models.families import Family, llama, register_family

_EVERY = 4


def check(args: Any) -> str | None:
    """Which layers have no rotary positions, which its files do not say."""
    expected = [int((layer + 1) % _EVERY != 0) for layer in range(args.num_hidden_layers)]
    if list(args.no_rope_layers) != expected:
        return "leaves rotary positions out in every fourth layer, and this model in others"
    return llama.check(args)


def complete(config: dict[str, Any]) -> None:
    """Which layers have no rotary positions."""
    config["no_rope_layer_interval"] = _EVERY


register_family(
    Family(
        name="smollm3",
        help="SmolLM3",
        order=80,
        hf_class="SmolLM3ForCausalLM",
        gguf="smollm3",
        pairs=True,
        check=check,
        check_hf=llama.check,
        complete=complete,
    )
)
