"""Mistral, which mlx-lm and llama.cpp run as a Llama."""

from __future__ import annotations

from mlx_fd.models.families import Family, register_family
from mlx_fd.models.families.llama import check

register_family(
    Family(
        name="mistral",
        help="Mistral 7B and Nemo",
        order=20,
        hf_class="MistralForCausalLM",
        # A file of this kind is read as a llama: it is the same model.
        gguf="llama",
        pairs=True,
        rope=frozenset({"default", "linear", "llama3", "yarn"}),
        check=check,
        check_hf=check,
    )
)
