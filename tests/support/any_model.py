"""Random weights for any configuration that mlx-lm can make a model of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map_with_path  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402

from support.tiny import make_tokenizer, write_tokenizer  # noqa: E402

# Sizes that most classes ask for.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 400,
    "max_position_embeddings": 4096,
}


def build(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of a configuration as mlx-lm alone reads it; its weights are not made yet."""
    model_class, args_class = _get_classes(config)
    return model_class(args_class.from_dict(copy.deepcopy(config)))


def write_model(path: Path, config: dict[str, Any], *, seed: int = 0) -> Path:
    """Write a model directory with random weights and a chat tokenizer.

    Args:
        path: the directory to make.
        config: complete in mlx-lm's own words.
        seed: of the weights; each has its own numbers.

    Returns:
        ``path``.
    """
    write_tokenizer(path, make_tokenizer())
    config = {"architectures": ["SomeForCausalLM"], "eos_token_id": 399, **config}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    model = build(config)
    mx.random.seed(seed)

    def some(name: str, array: mx.array) -> mx.array:
        if array.ndim < 2 or not mx.issubdtype(array.dtype, mx.floating):
            return array
        # Larger than what training begins with: logits are far from flat.
        return mx.random.normal(array.shape) * 0.15

    weights = dict(tree_flatten(tree_map_with_path(some, model.parameters())))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


def edit_config(path: Path, **entries: Any) -> None:
    """Change a model directory's config.json; ``...`` takes an entry out."""
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    kept = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(kept, indent=1))
