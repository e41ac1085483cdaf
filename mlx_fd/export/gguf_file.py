"""One GGUF file with the whole model, for llama.cpp: llama and qwen2.

A quantised tensor whose integers, scales and biases a block format of GGUF holds exactly is carried
over as it is. The layouts are those of ggml-common.h:

    Q4_1: w = d q + m, q in 0 .. 15        Q4_0: m = -8 d        Q8_0: w = d q, q in -128 .. 127

with d and m in float16 for each 32 weights; MLX's affine groups of 64 or 128 are two or four of
them. Everything else is fused in float32 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.export.gguf_tokenizer import read_vocabulary
from mlx_fd.export.source import Source, changed_modules, check_architecture, end_tokens, fused
from mlx_fd.models.gguf import GROUP, Shape, expected_tensors, llama3_divisors, permuted_heads
from mlx_fd.models.loading import open_lazily

if TYPE_CHECKING:
    import gguf
    from mlx import nn

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0")
_UNQUANTIZED = ("f32", "f16", "bf16")
_DEFAULT = "f16"


@dataclass(frozen=True)
class Written:
    """What a file came to hold.

    Attributes:
        kinds: type -> number of matrices of it.
        carried: matrices whose quantised numbers are the base's own.
    """

    kinds: dict[str, int]
    carried: int


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]
    carried: bool = False


# ----------------------------------------------------------------------------------- blocks of 32


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """MLX's 32-bit words (rows, words) as unsigned bytes (rows, columns)."""
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)


def _scales(module: nn.Module) -> list[np.ndarray]:
    """A quantised module's scales and biases for each 32 weights, in float32."""
    import mlx.core as mx

    return [
        np.repeat(np.array(array.astype(mx.float32)), module.group_size // GROUP, axis=-1)
        for array in (module.scales, module.biases)
    ]


def _block_formats(module: nn.Module) -> tuple[str, ...]:
    """The block formats that hold a module's quantised numbers exactly, the smallest first."""
    if not hasattr(module, "scales") or getattr(module, "mode", "affine") != "affine":
        return ()
    if module.bits not in (4, 8) or module.group_size % GROUP:
        return ()
    scales, biases = _scales(module)
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
    """A quantised module's matrix as the bytes of a block format (rows, bytes per row)."""
    integers = reorder(_unpack(np.array(module.weight), module.bits))
    rows = len(integers)
    values = integers.reshape(rows, -1, GROUP)
    heads = _scales(module)[: 2 if kind == "q4_1" else 1]
    parts: list[np.ndarray] = [
        np.ascontiguousarray(reorder(head).astype(np.float16))[..., None].view(np.uint8)
        for head in heads
    ]
    if kind == "q8_0":
        # Taking 128 off an unsigned byte is flipping its top bit.
        parts.append(values ^ 128)
    else:
        # The first half of a block is in the low halves of its bytes.
        parts.append(values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two halves of every head interleaved."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# --------------------------------------------------------------------------------------- the model


def _shape(args: Any) -> Shape:
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    return Shape(
        arch=args.model_type,
        layers=args.num_hidden_layers,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_key_value_heads,
        head_dim=head_dim,
        intermediate=args.intermediate_size,
        vocab=args.vocab_size,
        tied=bool(args.tie_word_embeddings),
    )


def _rope_scaling(args: Any) -> dict[str, Any]:
    """The model's ``rope_scaling`` with its type under ``type``.

    Raises:
        UserError: a kind that is not written.
    """
    scaling = dict(args.rope_scaling or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or getattr(args, "rope_traditional", False):
        raise UserError(
            f"--format gguf: rotary positions of type {kind} are not written; default, linear and "
            "llama3 are"
        )
    return {**scaling, "type": kind}


def _tensors(source: Source, shape: Shape, kind: str) -> list[_Tensor]:
    """Every matrix and vector of the model, with how to make it when its turn comes."""
    from mlx.utils import tree_flatten

    base, _ = open_lazily(source.ref.model)
    modules: dict[str, Any] = dict(base.named_modules())
    changed = changed_modules(source.ref)
    weights = dict(tree_flatten(fused(source.ref).parameters()))
    expected = expected_tensors(shape)
    targets = {target for target, _ in expected.values()}
    if unknown := sorted(weights.keys() - targets):
        raise UserError(
            f"--format gguf: {unknown[0]} has no place in a {shape.arch} file of llama.cpp's"
        )
    tensors = []
    for name, (target, size) in expected.items():
        heads = permuted_heads(shape, name)
        reorder = partial(_permute, heads=heads) if heads else np.ascontiguousarray
        module = target.removesuffix(".weight")
        formats: tuple[str, ...] = ()
        if len(size) > 1 and kind not in _UNQUANTIZED and module not in changed:
            formats = _block_formats(modules[module])
        if formats:
            chosen = kind if kind in formats else formats[0]
            make = partial(_blocks, modules[module], chosen, reorder)
            tensors.append(_Tensor(name, size, chosen, make, carried=True))
            continue
        chosen = kind if len(size) > 1 else "f32"
        if chosen not in _UNQUANTIZED and size[-1] % GROUP:
            chosen = "f16"
        tensors.append(
            _Tensor(name, size, chosen, partial(_rounded, weights, target, chosen, reorder))
        )
    return tensors


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
    if kind == "f16" and not np.isfinite(rounded).all():
        raise UserError(
            f"{name} has numbers that float16 cannot hold; choose --gguf-type bf16 or f32"
        )
    return rounded


def _quantization(kind: str) -> gguf.GGMLQuantizationType:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


# ---------------------------------------------------------------------------------------- the file


def _add_model(writer: gguf.GGUFWriter, source: Source, shape: Shape, args: Any) -> None:
    writer.add_name(source.name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(args.max_position_embeddings or 2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(args.rope_theta))
    writer.add_layer_norm_rms_eps(float(args.rms_norm_eps))
    writer.add_vocab_size(shape.vocab)
    scaling = _rope_scaling(args)
    if scaling["type"] == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _add_tokenizer(writer: gguf.GGUFWriter, source: Source, tokenizer: Any, shape: Shape) -> None:
    path = source.ref.model / "tokenizer.json"
    vocabulary = read_vocabulary(path, shape.vocab, shape.arch)
    ends = end_tokens(tokenizer)
    if ends is None:
        raise UserError(f"{path}: no token ends a turn, so llama.cpp would never stop")
    first, *others = ends if isinstance(ends, list) else [ends]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(first)
    # llama.cpp ends a turn at any of the three.
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(token)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(False)
    template = tokenizer.chat_template
    if template is not None:
        writer.add_chat_template(template)


def file_name(kind: str | None) -> str:
    """What an export calls a file of one of ``TYPES``; ``None``: of the default one."""
    return f"model-{kind or _DEFAULT}.gguf"


def write_file(
    source: Source,
    tokenizer: Any,
    file: Path,
    *,
    kind: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the whole model, the adapter fused into it.

    Args:
        source: what to write: a llama or qwen2 model with a byte-level BPE tokenizer.
        tokenizer: its tokenizer, as mlx-lm loads it.
        file: the file to write.
        kind: one of ``TYPES``, ``None``: f16. With a quantised type, matrices whose quantised
            numbers fit a block format keep them; norms and biases are float32 always.
        progress: called with the tensors written, and their number in all.

    Raises:
        UserError: another architecture or tokenizer, or weights that the type cannot hold.
    """
    import gguf

    kind = kind or _DEFAULT
    base, config = open_lazily(source.ref.model)
    check_architecture(config["model_type"], "--format gguf")
    args: Any = base.args
    shape = _shape(args)
    scaling = _rope_scaling(args)
    tensors = _tensors(source, shape, kind)
    if scaling["type"] == "llama3":
        divisors = _divisors(args, shape, scaling)
        tensors.append(_Tensor("rope_freqs.weight", divisors.shape, "f32", lambda: divisors))
    writer = gguf.GGUFWriter(file, shape.arch)
    _add_model(writer, source, shape, args)
    _add_tokenizer(writer, source, tokenizer, shape)
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
    )


def _divisors(args: Any, shape: Shape, scaling: dict[str, Any]) -> np.ndarray:
    return llama3_divisors(
        args.rope_theta,
        shape.head_dim,
        scaling["factor"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    ).astype(np.float32)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _announce(writer: gguf.GGUFWriter, tensor: _Tensor) -> None:
    """Tell the writer of a tensor whose numbers come later."""
    import gguf

    kind = _quantization(tensor.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(tensor.shape))
    writer.add_tensor_info(
        tensor.name, tensor.shape, np.dtype(np.float32), count // block * size, raw_dtype=kind
    )
