"""Granite 3: a Llama with four scales."""

from __future__ import annotations

from mlx_fd.models.families import Family, Key, register_family

register_family(
    Family(
        name="granite",
        help="Granite 3",
        order=90,
        hf_class="GraniteForCausalLM",
        gguf="granite",
        keys=(
            Key("attention.scale", "attention_multiplier", float),
            Key("embedding_scale", "embedding_multiplier", float),
            Key("residual_scale", "residual_multiplier", float),
            Key("logit_scale", "logits_scaling", float),
        ),
        biases={"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"},
        pairs=True,
        rope=frozenset({"default", "linear", "llama3", "yarn"}),
    )
)
