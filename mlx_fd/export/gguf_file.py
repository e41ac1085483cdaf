"""One GGUF file with the whole model, for llama.cpp: the families in ``models/families``.

A quantised tensor whose integers, scales and biases a block format of GGUF holds exactly is carried
over as it is (``models/gguf_layout.py``); MLX's affine groups of 64 or 128 are two or four blocks.
Everything else is fused in float32 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.export.gguf_tokenizer import read_vocabulary
from mlx_fd.export.source import Source, changed_modules, end_tokens, fused_text, open_text
from mlx_fd.models import rope_scaling
from mlx_fd.models.families import COMMON, Family
from mlx_fd.models.gguf_layout import (
    GROUP,
    Packed,
    interleave,
    interleaved_heads,
    is_norm,
    tensor_names,
    to_blocks,
    unpack,
)
from mlx_fd.models.gguf_tokens import END_TOKENS

if TYPE_CHECKING:
    import gguf
    from mlx import nn

TYPES = ("f32", "f16", "bf16", "q8_0", "mxfp4", "q4_1", "q4_0")
_UNQUANTIZED = ("f32", "f16", "bf16")
_DEFAULT = "f16"
# What a matrix becomes whose own numbers are not MXFP4 where that was asked for.
_BESIDE_MXFP4 = "q8_0"
_MXFP4_GROUP = 32
# Numbers in float16 that a block begins with: its scale, of q4_1 its smallest weight, too.
_SCALES = {"q8_0": 1, "q4_0": 1, "q4_1": 2}


@dataclass(frozen=True)
class Written:
    """What a file came to hold.

    Attributes:
        kinds: type -> number of matrices of it.
        carried: matrices whose quantised numbers are the base's own.
        unnamed_ends: tokens that end a turn, of which llama.cpp is not told.
    """

    kinds: dict[str, int]
    carried: int
    unnamed_ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]
    carried: bool = False


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model that its ``ModelArgs`` may leave to a rule."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int


def _sizes(args: Any) -> _Sizes:
    heads = args.num_attention_heads
    return _Sizes(
        layers=args.num_hidden_layers,
        heads=heads,
        kv_heads=args.num_key_value_heads or heads,
        head_dim=getattr(args, "head_dim", None) or args.hidden_size // heads,
        rows=args.vocab_size,
    )


# ----------------------------------------------------------------------------------- blocks of 32


def _packed(module: nn.Module) -> Packed:
    """A quantised module's numbers in groups of 32; affine scales and biases in float32."""
    import mlx.core as mx

    integers = unpack(np.array(module.weight), module.bits)
    if module.mode != "affine":
        return Packed(integers, np.array(module.scales), None, module.bits)
    scales, biases = (
        np.repeat(np.array(array.astype(mx.float32)), module.group_size // GROUP, axis=-1)
        for array in (module.scales, module.biases)
    )
    return Packed(integers, scales, biases, module.bits)


def _block_formats(module: nn.Module) -> tuple[str, ...]:
    """The block formats that hold a module's quantised numbers exactly, the smallest first."""
    if not hasattr(module, "scales"):
        return ()
    mode = getattr(module, "mode", "affine")
    if mode == "mxfp4":
        return ("mxfp4",) if module.group_size == _MXFP4_GROUP else ()
    if mode != "affine" or module.bits not in (4, 8) or module.group_size % GROUP:
        return ()
    packed = _packed(module)
    scales, biases = packed.scales, packed.biases
    assert biases is not None
    with np.errstate(over="ignore"):
        halves = [array.astype(np.float16) for array in (scales, biases)]
    if not all(map(np.array_equal, halves, (scales, biases))):
        return ()
    # Powers of two times a float16 are exact in float32, where these are compared.
    if module.bits == 8:
        return ("q8_0",) if np.array_equal(biases, -128 * scales) else ()
    return ("q4_0", "q4_1") if np.array_equal(biases, -8 * scales) else ("q4_1",)


def _blocks(
    module: nn.Module, kind: str, reorder: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A quantised module's matrix as the bytes of a block format [..., bytes per row]."""
    packed = _packed(module)
    scales, biases = packed.scales, packed.biases
    if biases is not None:
        scales, biases = scales.astype(np.float16), biases.astype(np.float16)
    ordered = Packed(
        reorder(packed.integers),
        reorder(scales),
        None if biases is None else reorder(biases),
        packed.bits,
    )
    return to_blocks(ordered, kind.upper())


# --------------------------------------------------------------------------------------- the model


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor whose numbers are rounded to it."""
    # llama.cpp adds and multiplies these in float32 only; a router is small, and decides much.
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight")):
        return "f32"
    kind = _BESIDE_MXFP4 if kind == "mxfp4" else kind
    return "f16" if kind not in _UNQUANTIZED and shape[-1] % GROUP else kind


def _tensors(source: Source, family: Family, sizes: _Sizes, kind: str) -> list[_Tensor]:
    """Every matrix and vector of the model, with how to make it when its turn comes."""
    from mlx.utils import tree_flatten

    base, _, _ = open_text(source.ref, "--format gguf")
    modules: dict[str, Any] = dict(base.named_modules())
    changed = changed_modules(source.ref)
    weights = dict(tree_flatten(fused_text(source.ref).parameters()))
    name_of = tensor_names(family, sizes.layers)
    tensors = []
    for target, array in weights.items():
        name = _named(name_of(target), target, family)
        shape = tuple(array.shape)
        heads = interleaved_heads(family, name, sizes.heads, sizes.kv_heads)
        reorder = partial(interleave, heads=heads) if heads else np.ascontiguousarray
        module, _, part = target.rpartition(".")
        wanted = _kind(name, shape, kind)
        formats: tuple[str, ...] = ()
        if part == "weight" and module not in changed and wanted != "f32":
            formats = _block_formats(modules[module]) if kind not in _UNQUANTIZED else ()
        if formats:
            chosen = kind if kind in formats else formats[0]
            make = partial(_blocks, modules[module], chosen, reorder)
            tensors.append(_Tensor(name, shape, chosen, make, carried=True))
            continue
        shift = family.norm_shift if is_norm(name) else 0.0
        make = partial(_rounded, weights, target, wanted, partial(_shifted, reorder, shift))
        tensors.append(_Tensor(name, shape, wanted, make))
    if kind == "mxfp4" and not any(tensor.kind == kind for tensor in tensors):
        raise UserError(
            "--gguf-type mxfp4 keeps the matrices of a model that is in MXFP4, and none of this "
            f"one is; choose {_BESIDE_MXFP4}"
        )
    return tensors


def _shifted(
    reorder: Callable[[np.ndarray], np.ndarray], shift: float, array: np.ndarray
) -> np.ndarray:
    return reorder(array + np.float32(shift) if shift else array)


def _rounded(
    weights: dict[str, Any],
    name: str,
    kind: str,
    reorder: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """One tensor in another type; its float32 array goes with it."""
    from gguf import quants

    array = reorder(np.array(weights.pop(name)))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: np.ndarray = quants.quantize(array, _quantization(kind))
    if not _is_finite(rounded, kind):
        raise UserError(
            f"{name} has numbers that {kind} cannot hold; choose --gguf-type bf16 or f32"
        )
    return rounded


def _is_finite(rounded: np.ndarray, kind: str) -> bool:
    """Whether no number of a tensor became infinite in a type whose range is float16's."""
    if kind == "f16":
        return bool(np.isfinite(rounded).all())
    if kind not in _SCALES:
        return True
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[_quantization(kind)]
    scales = np.ascontiguousarray(rounded.reshape(-1, size)[:, : 2 * _SCALES[kind]])
    return bool(np.isfinite(scales.view(np.float16)).all())


def _quantization(kind: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


# ---------------------------------------------------------------------------------------- the file


def _metadata(family: Family, args: Any, config: dict[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """Key (after the architecture) -> value of all that llama.cpp computes with."""
    found: dict[str, Any] = {}
    for key in (*COMMON, *family.keys):
        value = getattr(args, key.option, None)
        value = config.get(key.option) if value is None else value
        value = key.default if value is None else value
        if value is None:
            raise UserError(f"--format gguf: config.json has no {key.option}")
        found[key.name] = key.kind(value)
    return {
        **found,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": rope_scaling.rotary_dims(args, sizes.head_dim),
        "vocab_size": sizes.rows,
    }


def _check(family: Family, args: Any) -> None:
    """Make sure that llama.cpp computes what mlx-lm does.

    Raises:
        UserError: it does not.
    """
    differs = family.check(args)
    for option, value in family.constants.items():
        if getattr(args, option, value) != value:
            differs = f"takes {option} = {value}, and this model has {getattr(args, option)}"
    if differs is not None:
        raise UserError(f"--format gguf: llama.cpp {differs}; --format mlx keeps it")


def _add(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _add_tokenizer(
    writer: gguf.GGUFWriter, source: Source, tokenizer: Any, rows: int, arch: str
) -> tuple[str, ...]:
    """Add the tokenizer; the tokens that end a turn and for which llama.cpp has no name."""
    path = source.ref.model / "tokenizer.json"
    used = {n: one for n, one in tokenizer.added_tokens_decoder.items() if n < rows}
    vocabulary = read_vocabulary(path, rows, arch, used)
    ends = end_tokens(tokenizer)
    if ends is None:
        raise UserError(f"{path}: no token ends a turn, so llama.cpp would never stop")
    ends = ends if isinstance(ends, list) else [ends]
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    # llama.cpp ends a turn at any of the three.
    named = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(named, ends, strict=False):
        add(token)
    unnamed = ends[len(named) :]
    if unnamed:
        writer.add_array(END_TOKENS, ends)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        # transformers may add a token of its own, for which the model has no row.
        if token is not None and token < rows:
            add(token)
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    template = tokenizer.chat_template
    if template is not None:
        writer.add_chat_template(template)
    return tuple(vocabulary.tokens[token] for token in unnamed)


def file_name(kind: str | None) -> str:
    """What an export calls a file of one of ``TYPES``; ``None``: of the default one."""
    return f"model-{kind or _DEFAULT}.gguf"


def check_source(source: Source) -> None:
    """Make sure that llama.cpp has a model's architecture and tokenizer. No weight is read.

    Args:
        source: what is to be written.

    Raises:
        UserError: it has not, or would compute otherwise.
    """
    from mlx.utils import tree_flatten

    base, _, family = open_text(source.ref, "--format gguf")
    args: Any = base.args
    _check(family, args)
    sizes = _sizes(args)
    rope_scaling.to_file(family, args, sizes.head_dim)
    read_vocabulary(source.ref.model / "tokenizer.json", sizes.rows, family.gguf)
    name_of = tensor_names(family, sizes.layers)
    for name, _ in tree_flatten(base.parameters()):
        if not name.endswith((".scales", ".biases", ".global_scale")):
            _named(name_of(name), name, family)


def _named(found: str | None, name: str, family: Family) -> str:
    if found is None:
        raise UserError(
            f"--format gguf: {name} has no place in a {family.gguf} file of llama.cpp's"
        )
    return found


def write_file(
    source: Source,
    tokenizer: Any,
    file: Path,
    *,
    kind: str | None = None,
    further: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the whole model, the adapter fused into it.

    Args:
        source: what to write: a model of one of the families, with a byte-level BPE tokenizer.
        tokenizer: its tokenizer, as mlx-lm loads it.
        file: the file to write.
        kind: one of ``TYPES``, ``None``: f16. With a quantised type, matrices whose quantised
            numbers fit a block format keep them; norms and biases are float32 always.
        further: metadata beside all that llama.cpp needs: texts, numbers, and lists of numbers, key
            by key.
        progress: called with the tensors written, and their number in all.

    Raises:
        UserError: another architecture or tokenizer, a model that llama.cpp would compute
            otherwise, or weights that the type cannot hold.
    """
    import gguf

    kind = kind or _DEFAULT
    base, config, family = open_text(source.ref, "--format gguf")
    args: Any = base.args
    _check(family, args)
    sizes = _sizes(args)
    scaling = rope_scaling.to_file(family, args, sizes.head_dim)
    tensors = _tensors(source, family, sizes, kind)
    for name, table in scaling.tables.items():
        tensors.append(_Tensor(name, table.shape, "f32", partial(np.copy, table)))
    writer = gguf.GGUFWriter(file, family.gguf)
    writer.add_name(source.name)
    metadata = {**_metadata(family, args, config, sizes), **scaling.metadata}
    _add(writer, {f"{family.gguf}.{name}": value for name, value in metadata.items()})
    _add(writer, further or {})
    unnamed = _add_tokenizer(writer, source, tokenizer, sizes.rows, family.gguf)
    writer.add_file_type(gguf.LlamaFileType[_file_type(kind)])
    if kind not in _UNQUANTIZED:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        _announce(writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, tensor in enumerate(tensors):
        writer.write_tensor_data(tensor.make())
        if progress is not None:
            progress(index + 1, len(tensors))
    writer.close()
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    return Written(
        dict(Counter(tensor.kind for tensor in matrices)),
        sum(tensor.carried for tensor in matrices),
        unnamed,
    )


def _file_type(kind: str) -> str:
    return {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}.get(kind, f"MOSTLY_{kind.upper()}")


def _announce(writer: gguf.GGUFWriter, tensor: _Tensor) -> None:
    """Tell the writer of a tensor whose numbers come later."""
    import gguf

    kind = _quantization(tensor.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(tensor.shape))
    writer.add_tensor_info(
        tensor.name, tensor.shape, np.dtype(np.float32), count // block * size, raw_dtype=kind
    )
