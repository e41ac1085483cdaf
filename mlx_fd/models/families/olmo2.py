"""OLMo 2: norms after attention and feed-forward, and on queries and keys."""

from __future__ import annotations

from mlx_fd.models.families import Family, register_family

register_family(
    Family(
        name="olmo2",
        help="OLMo 2",
        order=110,
        hf_class="Olmo2ForCausalLM",
        gguf="olmo2",
    )
)
