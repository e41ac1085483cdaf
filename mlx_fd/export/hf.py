"""Hugging Face directories: what transformers, vLLM or SGLang open without knowing of MLX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.export.mlx_dir import MLX_KEYS
from mlx_fd.export.source import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    Source,
    changed_modules,
    copy_file,
    copy_tokenizer,
    end_tokens,
    fused_text,
    open_text,
)
from mlx_fd.files import write_json
from mlx_fd.models.families import COMMON, FAMILIES, Family, Weights
from mlx_fd.models.rope_scaling import for_transformers, kind_of
from mlx_fd.models.storage import read_json
from mlx_fd.models.student import read_arrays

if TYPE_CHECKING:
    from mlx import nn

# The hub's own limit for one file of a model.
_SHARD_BYTES = 5_000_000_000
# Those that are of the base's directory: its form of weights, and files of code that are not here.
_LEFT_OUT = (*MLX_KEYS, "dtype", "auto_map")
# Entries of config.json for which mlx-lm and transformers have defaults of their own.
_SAID = ("num_key_value_heads", "head_dim", "vocab_size")


def _config(
    config: dict[str, Any], model: nn.Module, family: Family, dtype: str, tokenizer: Any
) -> dict[str, Any]:
    """config.json with all that mlx-lm and transformers would fill in differently."""
    args: Any = model.args
    written = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    # Positions of pictures are none of a text's.
    if kind_of(written.get("rope_scaling")) == "default":
        written.pop("rope_scaling", None)
    if isinstance(rope := written.get("rope_parameters"), dict):
        written["rope_parameters"] = {
            key: "default" if value == "mrope" else value
            for key, value in rope.items()
            if not key.startswith("mrope_")
        }
    options = (*_SAID, *(key.option for key in (*COMMON, *family.keys)))
    said = {name: getattr(args, name, None) for name in options}
    overrides = {
        **{name: value for name, value in said.items() if value is not None},
        "architectures": [family.hf_class],
        "tie_word_embeddings": "lm_head" not in model,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_tokens(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": dtype,
    }
    if scaling := for_transformers(family, args):
        overrides["rope_scaling"] = scaling
        parameters = written.get("rope_parameters")
        if parameters and "rope_type" in parameters:
            overrides["rope_parameters"] = {**parameters, **scaling}
    return dict(sorted({**written, **overrides}.items()))


def _check(folder: Path, args: Any, family: Family) -> None:
    """Make sure that transformers reads the configuration as mlx-lm does.

    Raises:
        UserError: it reads a number otherwise.
    """
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder)
    rope = getattr(read, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    for key in (*COMMON, *family.keys):
        ours = getattr(args, key.option, None)
        read_as = rope.get("rope_theta") if key.option == "rope_theta" else None
        read_as = getattr(read, key.option, ours) if read_as is None else read_as
        if ours is not None and read_as != ours:
            raise UserError(
                f"--format hf: transformers would read {key.option} as {read_as} where mlx-lm has "
                f"{ours}, so that it would be another model; --format mlx keeps it"
            )
    kinds = kind_of(rope), kind_of(getattr(args, "rope_scaling", None))
    if kinds[0] != kinds[1]:
        raise UserError(
            f"--format hf: transformers would scale rotary positions as {kinds[0]} where mlx-lm "
            f"does as {kinds[1]}, so that it would be another model; --format mlx keeps it"
        )


def _blocks(source: Source, family: Family) -> Weights:
    """The modules that stay in MXFP4, as blocks and scales: all that can, untouched, or none."""
    import mlx.core as mx

    base, _, _ = open_text(source.ref, "--format hf")
    changed = changed_modules(source.ref)
    found: Weights = {}
    for name, module in base.named_modules():
        if not family.mxfp4 or family.mxfp4 not in name or "weight" not in module:
            continue
        if getattr(module, "mode", None) != "mxfp4" or name in changed:
            return {}
        scales = module.scales
        found[f"{name}.weight"] = module.weight.view(mx.uint8).reshape(*scales.shape, -1)
        found[f"{name}.scales"] = scales
    return found


def _generation_config(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    if settings := read_json(source.ref.model / GENERATION_CONFIG):
        return {**settings, "eos_token_id": config["eos_token_id"]}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def check_source(source: Source) -> None:
    """Make sure that transformers computes what mlx-lm does. No weight is read.

    Raises:
        UserError: the model is of no known family, or transformers would compute otherwise.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model, _, family = open_text(source.ref, "--format hf")
    differs = family.check_hf(model.args)
    kind = kind_of(getattr(model.args, "rope_scaling", None))
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        differs = f"has no rotary positions of type {kind}"
    if differs is not None:
        raise UserError(f"--format hf: transformers {differs}; --format mlx keeps it")


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
        source: what to write: a model of one of the families in ``models/families``.
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

    _, config, family = open_text(source.ref, "--format hf")
    model = fused_text(source.ref)
    dtype = dtype or "bfloat16"
    model.set_dtype(getattr(mx, dtype))
    blocks = _blocks(source, family)
    dense = {n: w for n, w in tree_flatten(model.parameters()) if n not in blocks}
    weights = {**family.to_hf(dense), **family.blocks_to_hf(blocks)}
    args: Any = model.args
    config = _config(config, model, family, dtype, tokenizer)
    if blocks:
        # What transformers is not to look for blocks of.
        plain = {n.rpartition(".")[0] for n, w in dense.items() if family.mxfp4 not in n}
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": sorted(plain),
        }
    del model
    write_json(folder / "config.json", config)
    _check(folder, args, family)
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
    write_json(folder / GENERATION_CONFIG, _generation_config(source, config))
    copy_tokenizer(source.ref.model, folder)


def mlx_opens(source: Source) -> bool:
    """Whether mlx-lm opens what :func:`write_model` writes, as it is."""
    _, _, family = open_text(source.ref, "--format hf")
    return family.from_hf is None or bool(_blocks(source, family))


def read_back(folder: Path, scratch: Path) -> Path:
    """What :func:`write_model` wrote as a directory that mlx-lm opens.

    Args:
        folder: where it is.
        scratch: an empty folder, for families whose form in transformers mlx-lm cannot read.

    Returns:
        ``folder``, or a directory within ``scratch``.
    """
    import mlx.core as mx

    config = read_json(folder / "config.json")
    family = FAMILIES[config["model_type"]]
    if family.from_hf is None or "quantization_config" in config:
        return folder
    out = scratch / "model"
    out.mkdir()
    for file in sorted(folder.iterdir()):
        # Each tensor by itself says what it becomes, so that parts may be read one after another.
        if file.suffix == ".safetensors" and file.name.startswith("model"):
            weights = family.from_hf(read_arrays(file))
            mx.save_safetensors(str(out / file.name), weights, metadata={"format": "mlx"})
        elif file.name in (*TOKENIZER_FILES, "config.json", GENERATION_CONFIG):
            copy_file(file, out)
    return out
