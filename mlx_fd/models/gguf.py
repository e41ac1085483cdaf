"""GGUF files of the families in ``models/families`` as mlx-lm model directories.

Tensors in a block format that is one of MLX's own (``gguf_layout.CARRIED``) keep their integers, so
that nothing is rounded twice; those of other block formats, K-quants among them, are dequantised by
the ``gguf`` package and stored in 16 bits. Which tensors a file must have, and of what shapes, is
asked of mlx-lm's own model of its configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fd.models import rope_scaling
from mlx_fd.models.families import COMMON, FAMILIES, Family, Key
from mlx_fd.models.gguf_layout import (
    CARRIED,
    GROUP,
    deinterleave,
    from_blocks,
    interleaved_heads,
    is_norm,
    pack,
    tensor_names,
)
from mlx_fd.models.gguf_reading import GgufFile
from mlx_fd.models.gguf_tokens import end_tokens, read_tokens, token_id, write_tokenizer
from mlx_fd.models.storage import new_directory

if TYPE_CHECKING:
    import mlx.core as mx

# Part of the cache's key: raised when a conversion comes to give other files.
FORMAT = 4
_PLAIN = ("F32", "F16", "BF16")
# Bytes of weights in one file of the directory; as many are in memory at once.
_SHARD_BYTES = 2_000_000_000
_MODES = {"MXFP4": "mxfp4"}
# Metadata by which llama.cpp computes something else, where its family has no entry for them, and
# the values at which it does not.
_PASSED_OVER: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"), (0,)),
    **dict.fromkeys(("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"), (1,)),
}


def _family(file: GgufFile) -> Family:
    arch = file.need("general.architecture", str)
    # The first one: mistral's files are llama's.
    for family in FAMILIES.values():
        if family.gguf == arch:
            return family
    known = dict.fromkeys(family.gguf for family in FAMILIES.values())
    raise file.bad(f"the architecture {arch} is not supported; {', '.join(known)} are")


def _option(file: GgufFile, family: Family, key: Key) -> Any:
    name = f"{family.gguf}.{key.name}"
    return file.size(name, key.default) if key.kind is int else file.number(name, key.default)


def _check_passed_over(file: GgufFile, family: Family, context: int) -> None:
    """Make sure that a file says nothing that mlx-lm's class of its family does not compute."""
    arch, known = family.gguf, {key.name for key in family.keys}
    for name, harmless in _PASSED_OVER.items():
        value = None if name in known else file.get(f"{arch}.{name}", (float, int))
        if value is not None and value not in harmless:
            raise file.bad(f"its {arch}.{name} is {value:g}, which mlx-lm does not compute")
    window = file.get(f"{arch}.attention.sliding_window", int, 0)
    # OLMo 3's files are called OLMo 2.
    if 0 < window < context and "attention.sliding_window" not in known:
        raise file.bad(
            f"some of its layers see {window} tokens only, and mlx-lm's {family.name} models have "
            "no such layers; take an mlx-community conversion"
        )
    if file.get(f"{arch}.rope.scaling.finetuned", bool) is False and family.name == "granite":
        raise file.bad("its layers turn no positions, and mlx-lm's granite models do")


def _options(file: GgufFile, family: Family) -> dict[str, Any]:
    """What the metadata says of the model's configuration."""
    arch = family.gguf
    options = {key.option: _option(file, family, key) for key in (*COMMON, *family.keys)}
    _check_passed_over(file, family, options["max_position_embeddings"])
    heads, hidden = options["num_attention_heads"], options["hidden_size"]
    options["num_key_value_heads"] = file.size(f"{arch}.attention.head_count_kv", heads)
    options["head_dim"] = file.size(f"{arch}.attention.key_length", hidden // heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.bad("the tensor token_embd.weight is missing")
    options["vocab_size"] = int(embedding.shape[-1])
    options["tie_word_embeddings"] = "output.weight" not in file.tensors
    layers, tensors = options["num_hidden_layers"], len(file.tensors)
    if layers > tensors:
        raise file.bad(f"it says {layers} layers but has only {tensors} tensors")
    return options


def _config(file: GgufFile, family: Family, tokens: list[str]) -> dict[str, Any]:
    """config.json, without what the weights decide."""
    from mlx_lm.utils import _get_classes

    arch = family.gguf
    options = _options(file, family)
    head_dim, heads = options["head_dim"], options["num_attention_heads"]
    kv_heads, hidden = options["num_key_value_heads"], options["hidden_size"]
    rotary = file.size(f"{arch}.rope.dimension_count", head_dim)
    taken = {
        field.name for field in dataclasses.fields(_get_classes({"model_type": family.name})[1])
    }
    if "partial_rotary_factor" in taken:
        options["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise file.bad(f"rotation over {rotary} numbers of heads of {head_dim} is not supported")
    if head_dim % 2 or heads % kv_heads or not 0 < rotary <= head_dim:
        raise file.bad(
            f"{heads} heads of {head_dim} with {kv_heads} key/value heads and rotation over "
            f"{rotary} are not supported"
        )
    if "head_dim" not in taken and head_dim * heads != hidden:
        raise file.bad(f"{heads} heads of {head_dim} do not make up the width {hidden}")
    ends = end_tokens(file, len(tokens))
    name_of = tensor_names(family, options["num_hidden_layers"])
    config: dict[str, Any] = {
        "model_type": family.name,
        "architectures": [family.hf_class],
        **options,
        **family.constants,
        **{
            option: name_of(f"model.layers.0.{module}.bias") in file.tensors
            for option, module in family.biases.items()
        },
        "bos_token_id": token_id(file, "bos", len(tokens)),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": token_id(file, "padding", len(tokens)),
    }
    if "head_dim" not in taken:
        del config["head_dim"]
    if scaling := _rope_scaling(file, family, config, rotary):
        config["rope_scaling"] = scaling
    family.complete(config)
    return config


def _rope_scaling(
    file: GgufFile, family: Family, config: dict[str, Any], rotary: int
) -> dict[str, Any] | None:
    before = f"{family.gguf}.rope.scaling"
    # The second is its name in older files.
    names = (f"{before}.factor", f"{family.gguf}.rope.scale_linear")
    factors = [value for name in names if (value := file.get(name, float)) is not None]
    factor = factors[0] if factors else None
    # As llama.cpp has it: without a type a factor is of linear scaling.
    stored = rope_scaling.Stored(
        kind=file.get(f"{before}.type", str, "none" if factor in (None, 0, 1) else "linear"),
        factor=factor,
        original=file.get(f"{before}.original_context_length", int),
        attention=file.get(f"{before}.attn_factor", float),
        beta_fast=file.get(f"{before}.yarn_beta_fast", float),
        beta_slow=file.get(f"{before}.yarn_beta_slow", float),
        tables={
            name: np.asarray(file.tensors[name].data, dtype=np.float64).reshape(-1)
            for name in rope_scaling.TABLES & file.tensors.keys()
        },
    )
    try:
        return rope_scaling.from_file(stored, family, config, rotary)
    except ValueError as error:
        raise file.bad(str(error)) from error


def _expected(file: GgufFile, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Name in the file -> (mlx-lm's name, shape) of every tensor that the model has.

    Raises:
        UserError: the file has others, or mlx-lm has no such model.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    # A count that a damaged file has must not be counted to.
    most = max(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    for key in (*COMMON, *family.keys):
        if (
            key.kind is int
            and key.option != "max_position_embeddings"
            and config[key.option] > most
        ):
            raise file.bad(
                f"the metadata entry {family.gguf}.{key.name} is {config[key.option]}, "
                "which cannot be"
            )
    try:
        model_class, arguments = _get_classes(config)
        # Its own configuration, as a copy: a class may change what it gets.
        model = model_class(arguments.from_dict(json.loads(json.dumps(config))))
        shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    except Exception as error:  # whatever a class makes of numbers that do not go together
        raise file.bad(f"mlx-lm makes no {family.name} model of its sizes ({error})") from error
    if config["tie_word_embeddings"]:
        shapes.pop("lm_head.weight", None)
    name_of = tensor_names(family, config["num_hidden_layers"])
    expected = {name_of(name) or name: (name, shape) for name, shape in shapes.items()}
    missing = sorted(expected.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - expected.keys() - rope_scaling.TABLES)
    if missing or extra:
        what = f"the tensor {missing[0]} is missing" if missing else f"unknown tensor {extra[0]}"
        raise file.bad(f"{what}; this is not a plain {family.gguf} model")
    for name, (_, shape) in expected.items():
        found = tuple(int(size) for size in reversed(file.tensors[name].shape))
        if found != shape:
            raise file.bad(f"the tensor {name} has shape {found}, expected {shape}")
    return expected


def _dtype(file: GgufFile) -> str:
    """The type of what is not quantised.

    Raises:
        UserError: a tensor has a type that can be neither carried over nor dequantised.
    """
    import gguf

    kinds = {tensor.tensor_type for tensor in file.tensors.values()}
    for kind in kinds:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, KeyError) as error:
            raise file.bad(
                f"tensors of type {kind.name} are not supported. Take the model in a common type, "
                "as Q4_K_M, Q8_0 or F16, or an mlx-community conversion"
            ) from error
    names = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if names <= {"F32"}:
        return "float32"
    # bfloat16 holds whatever MXFP4 does; the other block formats have scales in float16.
    return "bfloat16" if names <= {"F32", "BF16", "MXFP4"} else "float16"


def _weights(
    file: GgufFile, family: Family, config: dict[str, Any]
) -> Iterator[tuple[str, mx.array, dict[str, Any] | None]]:
    """Every array under mlx-lm's name, and of a quantised matrix how it is quantised."""
    import gguf
    import mlx.core as mx

    dtype = getattr(mx, _dtype(file))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, (target, size) in _expected(file, family, config).items():
        tensor = file.tensors[name]
        kind = tensor.tensor_type.name
        interleaved = interleaved_heads(family, name, heads, kv_heads)
        reorder = partial(deinterleave, heads=interleaved) if interleaved else np.ascontiguousarray
        data = np.asarray(tensor.data)
        if kind in CARRIED:
            with np.errstate(over="ignore", invalid="ignore"):
                packed = from_blocks(data, kind)
            module, mode = target.removesuffix(".weight"), _MODES.get(kind, "affine")
            quantized = {"group_size": GROUP, "bits": packed.bits, "mode": mode}
            yield target, mx.array(pack(reorder(packed.integers), packed.bits)), quantized
            for part, halves in (("scales", packed.scales), ("biases", packed.biases)):
                if halves is None:
                    continue
                if halves.dtype == np.float16 and not np.isfinite(halves).all():
                    raise file.bad(f"the tensor {name} has scales that are no 16-bit numbers")
                yield f"{module}.{part}", mx.array(reorder(halves)), None
            continue
        if kind == "BF16":
            array = mx.array(reorder(data.view(np.uint16).reshape(size))).view(mx.bfloat16)
        elif kind in _PLAIN:
            array = mx.array(reorder(data))
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                array = mx.array(reorder(gguf.quants.dequantize(data, tensor.tensor_type)))
        if family.norm_shift and is_norm(name):
            array = array.astype(mx.float32) - family.norm_shift
        array = array.astype(dtype)
        if kind not in _PLAIN and not mx.isfinite(array).all().item():
            raise file.bad(f"the tensor {name} has numbers that {_dtype(file)} cannot hold")
        yield target, array, None


def _write_weights(
    arrays: Iterator[tuple[str, mx.array, dict[str, Any] | None]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Write arrays as they come, in files of a limited size; gives each quantised module's form."""
    import mlx.core as mx

    shard: dict[str, mx.array] = {}
    files: list[Path] = []
    placed: dict[str, int] = {}
    forms: dict[str, dict[str, Any]] = {}
    total = 0

    def write() -> None:
        files.append(folder / f"part-{len(files)}.safetensors")
        mx.save_safetensors(str(files[-1]), shard, metadata={"format": "mlx"})
        shard.clear()

    for name, array, quantized in arrays:
        if sum(held.nbytes for held in shard.values()) + array.nbytes > _SHARD_BYTES and shard:
            write()
        shard[name] = array
        placed[name] = len(files)
        total += array.nbytes
        if quantized is not None:
            forms[name.removesuffix(".weight")] = quantized
    write()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return forms
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in sorted(placed.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return forms


def _quantization(forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """mlx-lm's ``quantization``: one form for most modules, and the others by name."""
    kinds = list(forms.values())
    default = max(kinds, key=kinds.count)
    return {**default, **{module: form for module, form in forms.items() if form != default}}


def convert(gguf_path: Path, out_dir: Path) -> None:
    """Write a GGUF file's model as an mlx-lm directory that ``mlx_lm.load`` opens unchanged.

    ``out_dir`` appears complete or not at all; where another process has made it meanwhile, that
    one stays. A score head in the file is written beside the model, as an export has it.

    Args:
        gguf_path: a file of one of the families, or one of the parts of such a file.
        out_dir: the directory to make.

    Raises:
        UserError: the file is missing, damaged, or holds something that is not supported.
    """
    from mlx_fd.models.backend import backend

    backend()
    from mlx_fd.models.score_head import SCORE_HEAD, from_gguf

    file = GgufFile(gguf_path)
    family = _family(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.bad("the tensor token_embd.weight is missing")
    tokens = read_tokens(file, int(embedding.shape[-1]))
    config = _config(file, family, tokens)
    with new_directory(out_dir) as working:
        write_tokenizer(file, family.gguf, tokens, working)
        if forms := _write_weights(_weights(file, family, config), working):
            config["quantization"] = config["quantization_config"] = _quantization(forms)
        (working / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if (head := from_gguf(file, config["hidden_size"])) is not None:
            head.write(working / SCORE_HEAD)
