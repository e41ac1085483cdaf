"""A model that is divided among all ranks: each has a part of every matrix.

mlx-lm divides its models itself (tensor parallelism): a rank has some of the heads and some of the
hidden units, and what the parts give is summed. Embeddings, norms and the head are whole on each
rank, so that every rank has the same states and logits, and each must call the model alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx import nn

from mlx_fd.errors import UserError
from mlx_fd.models import ranks


def shard(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Leave of a model this rank's part, in place.

    Args:
        path: its directory, for messages.
        model: its weights may be on the disk still.
        config: its config.json.

    Raises:
        UserError: mlx-lm cannot divide this architecture, or not among so many ranks.
    """
    count = ranks.processes()
    if not hasattr(model, "shard"):
        raise UserError(
            f"{path}: mlx-lm cannot divide a {config.get('model_type')} model among processes, as "
            "it can Llama, Qwen2, Qwen3, Ministral, DeepSeek and GLM-4-MoE. Leave --shard-expert "
            "out: each process then has the whole expert"
        )
    sizes = {**config, **(config.get("text_config") or {})}
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = sizes.get(name)
        if isinstance(heads, int) and heads % count:
            raise UserError(
                f"{path}: its {name} is {heads}, which {count} processes cannot divide among them; "
                "start as many as divide it"
            )
    try:
        model.shard(ranks.group())
    except ValueError as error:
        raise UserError(
            f"{path}: mlx-lm cannot divide this model among {count} processes: {error}"
        ) from error
