"""Hugging Face directories: what transformers, vLLM or SGLang open without knowing of MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_fd.export.mlx_dir import MLX_KEYS
from mlx_fd.export.source import Source, check_architecture, copy_tokenizer, end_tokens, fused
from mlx_fd.files import write_json
from mlx_fd.models.gguf import ARCHITECTURES
from mlx_fd.models.loading import open_lazily
from mlx_fd.models.storage import read_json

# The hub's own limit for one file of a model.
_SHARD_BYTES = 5_000_000_000


def _config(config: dict[str, Any], args: Any, dtype: str, tokenizer: Any) -> dict[str, Any]:
    """config.json with all that mlx-lm and transformers would fill in differently."""
    written = {key: value for key, value in config.items() if key not in MLX_KEYS}
    written.pop("dtype", None)
    overrides = {
        "architectures": [ARCHITECTURES[args.model_type]],
        "num_key_value_heads": args.num_key_value_heads,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_tokens(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": dtype,
    }
    return dict(sorted({**written, **overrides}.items()))


def _generation_config(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    if settings := read_json(source.ref.model / "generation_config.json"):
        return {**settings, "eos_token_id": config["eos_token_id"]}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def write_model(
    source: Source,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write the whole model, the adapter fused into it.

    Args:
        source: what to write: a llama or qwen2 model.
        tokenizer: its tokenizer, as mlx-lm loads it.
        folder: an empty folder.
        dtype: of the weights; ``None``: bfloat16.
        shard_bytes: most bytes of weights in one file.

    Raises:
        UserError: another architecture, or a file of the base that cannot be read.
    """
    import mlx.core as mx
    from huggingface_hub import split_state_dict_into_shards_factory
    from mlx.utils import tree_flatten

    _, config = open_lazily(source.ref.model)
    check_architecture(config["model_type"], "--format hf")
    model = fused(source.ref)
    dtype = dtype or "bfloat16"
    model.set_dtype(getattr(mx, dtype))
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    config = _config(config, model.args, dtype, tokenizer)
    del model
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for name, tensors in split.filename_to_tensors.items():
        # Popped: a shard's arrays go once they are written.
        shard = {tensor: weights.pop(tensor) for tensor in tensors}
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": split.metadata,
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _generation_config(source, config))
    copy_tokenizer(source.ref.model, folder)
