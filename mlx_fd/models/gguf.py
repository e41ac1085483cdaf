"""GGUF files of the llama and qwen2 architectures as mlx-lm model directories.

Block-quantised tensors keep their integers: Q4_0, Q4_1 and Q8_0 are affine quantisation in groups
of 32, which is one of MLX's own formats, so nothing is rounded twice. The layout's facts that the
writer (``mlx_fd.export.gguf_file``) needs too are public here.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_fd.errors import UserError
from mlx_fd.models.storage import new_directory

if TYPE_CHECKING:
    import mlx.core as mx

# Part of the cache's key: raised when a conversion comes to give other files.
FORMAT = 2
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
GROUP = 32
# No vocabulary is near this long; a longer array is a damaged length field.
_LONGEST_ARRAY = 1 << 21
_SUPPORTED = "F32, F16, BF16, Q4_0, Q4_1 and Q8_0"

# How llama.cpp's `tokenizer.ggml.pre` splits text before the merges: one split after another.
# The expressions are the models' own (their published tokenizer.json).
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.format(digits=r"\p{N}")
_LLAMA3 = _CL100K.format(digits=r"\p{N}{1,3}")
PRETOKENIZERS = {
    "gpt-2": "gpt2",
    "smollm": "digits+gpt2",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# Kinds of token in `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Shape(NamedTuple):
    """The sizes that decide every tensor's shape; ``tied``: the embedding is the head too."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool


class _File:
    """A GGUF file's metadata and tensors, with every access checked.

    Attributes:
        path: the file, for messages.
        tensors: name -> ``gguf.ReaderTensor``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _read(path)
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def bad(self, what: str) -> UserError:
        """The error for a file that is not what it should be."""
        return UserError(f"{self.path}: {what}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the given Python type, or ``default`` where it is missing."""
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except Exception as error:  # the reader has no error class of its own
            raise self.bad(f"the metadata entry {key} cannot be read ({error})") from error
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(f"the metadata entry {key} has an unexpected type")
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A metadata value that must be there."""
        value = self.get(key, kind)
        if value is None:
            raise self.bad(f"the metadata entry {key} is missing; convert the model again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A metadata value that is a positive count."""
        value = self.get(key, int, default)
        if value is None:
            raise self.bad(f"the metadata entry {key} is missing; convert the model again")
        if not 0 < value < 1 << 31:
            raise self.bad(f"the metadata entry {key} is {value}, which cannot be")
        return int(value)


def _read(path: Path) -> Any:
    """Open a GGUF file with the gguf package, which by itself reads past the end of a short one."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:
                length = int(self._get(orig_offs + 4, np.uint64)[0])
                if length > _LONGEST_ARRAY:
                    raise ValueError(f"it has an array of {length} values")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file")
    try:
        with np.errstate(over="ignore"):
            return Reader(path)
    except Exception as error:  # it has no error class of its own: anything means a damaged file
        raise UserError(
            f"{path} is damaged or incomplete ({error}); download or convert it again"
        ) from error


def _shape(file: _File) -> Shape:
    arch = file.need("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise file.bad(f"the architecture {arch} is not supported; llama and qwen2 are")
    hidden = file.size(f"{arch}.embedding_length")
    heads = file.size(f"{arch}.attention.head_count")
    kv_heads = file.size(f"{arch}.attention.head_count_kv", heads)
    head_dim = file.size(f"{arch}.attention.key_length", hidden // heads)
    rotary = file.size(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim or head_dim % 2 or heads % kv_heads:
        raise file.bad(
            f"{heads} heads of {head_dim} with {kv_heads} key/value heads and rotation over "
            f"{rotary} are not supported"
        )
    if arch == "qwen2" and head_dim * heads != hidden:
        raise file.bad(f"{heads} heads of {head_dim} do not make up the width {hidden}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.bad("the tensor token_embd.weight is missing")
    layers = file.size(f"{arch}.block_count")
    if layers > len(file.tensors):
        raise file.bad(f"it says {layers} layers but has only {len(file.tensors)} tensors")
    return Shape(
        arch=arch,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=file.size(f"{arch}.feed_forward_length"),
        vocab=int(embedding.shape[-1]),
        tied="output.weight" not in file.tensors,
    )


def expected_tensors(shape: Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> (mlx-lm name, shape as rows x columns)."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, wide = shape.hidden, shape.intermediate
    sizes: dict[str, tuple[int, ...]] = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (shape.vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    for layer in range(shape.layers):
        for short, size in sizes.items():
            name = f"model.layers.{layer}.{_LAYER_NAMES[short]}"
            tensors[f"blk.{layer}.{short}.weight"] = (f"{name}.weight", size)
            if shape.arch == "qwen2" and short in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{short}.bias"] = (f"{name}.bias", size[:1])
    if not shape.tied:
        tensors["output.weight"] = ("lm_head.weight", (shape.vocab, hidden))
    return tensors


def permuted_heads(shape: Shape, name: str) -> int | None:
    """Heads over which a tensor's rows are interleaved in the file; ``None``: they are not."""
    if shape.arch != "llama" or not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return None
    return shape.heads if ".attn_q." in name else shape.kv_heads


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned bytes (rows, columns) in MLX's packing: little end first in 32-bit words."""
    if bits == 4:
        values = values[:, 0::2] | values[:, 1::2] << 4
    return np.ascontiguousarray(values).view("<u4")


def _nibbles(block: np.ndarray) -> np.ndarray:
    """16 bytes of a 4-bit block as its 32 values: the low halves come first."""
    return np.concatenate([block & 15, block >> 4], axis=-1)


def _blocks(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Split block-quantised rows into what MLX's affine format holds.

    Args:
        data: the file's bytes, (rows, bytes per row).
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q8_0"`` (the layouts are those of ggml-common.h).

    Returns:
        Unsigned bytes (rows, columns), scales and biases (rows, columns / 32) in float16,
        and the number of bits.
    """
    rows = len(data)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    block = data.reshape(rows, -1, size)
    scales = np.ascontiguousarray(block[..., :2]).view(np.float16)[..., 0]
    if kind == "Q4_1":
        biases = np.ascontiguousarray(block[..., 2:4]).view(np.float16)[..., 0]
        return _nibbles(block[..., 4:]).reshape(rows, -1), scales, biases, 4
    if kind == "Q4_0":
        return _nibbles(block[..., 2:]).reshape(rows, -1), scales, scales * np.float16(-8), 4
    # Adding 128 to a signed byte is flipping its sign bit.
    unsigned = (block[..., 2:] ^ 128).reshape(rows, -1)
    return unsigned, scales, scales * np.float16(-128), 8


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k.

    Its converter interleaves the two halves of every head (for rotation of neighbouring pairs);
    mlx-lm rotates the halves against each other.
    """
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _model_dtype(file: _File) -> str:
    kinds = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1}
    if unsupported := sorted(kinds - {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"}):
        raise file.bad(
            f"tensors of type {', '.join(unsupported)} are not supported; {_SUPPORTED} are. "
            "Take the model in one of those, or an mlx-community conversion"
        )
    if "F16" in kinds or any(kind.startswith("Q") for kind in kinds):
        return "float16"
    return "bfloat16" if "BF16" in kinds else "float32"


def _weights(file: _File, shape: Shape) -> tuple[dict[str, mx.array], dict[str, int]]:
    """All tensors under mlx-lm's names, and the bits of each quantised module."""
    import mlx.core as mx

    expected = expected_tensors(shape)
    missing = sorted(expected.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - expected.keys() - {"rope_freqs.weight"})
    if missing or extra:
        what = f"the tensor {missing[0]} is missing" if missing else f"unknown tensor {extra[0]}"
        raise file.bad(f"{what}; this is not a plain {shape.arch} model")
    dtype = getattr(mx, _model_dtype(file))
    weights: dict[str, mx.array] = {}
    bits_of: dict[str, int] = {}
    for name, (target, size) in expected.items():
        tensor = file.tensors[name]
        kind = tensor.tensor_type.name
        if tuple(int(n) for n in reversed(tensor.shape)) != size:
            raise file.bad(f"the tensor {name} has shape {tensor.shape}, expected {size[::-1]}")
        heads = permuted_heads(shape, name)
        reorder = partial(_unpermute, heads=heads) if heads else np.ascontiguousarray
        if kind in ("Q4_0", "Q4_1", "Q8_0"):
            with np.errstate(over="ignore", invalid="ignore"):
                values, scales, biases, bits = _blocks(np.asarray(tensor.data), kind)
            if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
                raise file.bad(f"the tensor {name} has scales that are no 16-bit numbers")
            module = target.removesuffix(".weight")
            bits_of[module] = bits
            weights[target] = mx.array(_pack(reorder(values), bits))
            weights[f"{module}.scales"] = mx.array(reorder(scales))
            weights[f"{module}.biases"] = mx.array(reorder(biases))
        elif kind == "BF16":
            raw = np.asarray(tensor.data).view(np.uint16).reshape(size)
            weights[target] = mx.array(reorder(raw)).view(mx.bfloat16).astype(dtype)
        elif kind in ("F32", "F16"):
            weights[target] = mx.array(reorder(np.asarray(tensor.data))).astype(dtype)
        else:
            raise file.bad(f"the tensor {name} is {kind}; supported are {_SUPPORTED}")
    return weights, bits_of


def llama3_divisors(
    base: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by, [head_dim / 2] (Llama 3.1's reference code).

    Args:
        base: the rotary base.
        head_dim: size of a head.
        factor: by how much the lowest frequencies are slowed down.
        low: waves longer than ``original / low`` are slowed down whole.
        high: waves shorter than ``original / high`` stay as they are.
        original: the context length before the scaling.
    """
    wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _rope_scaling(file: _File, shape: Shape, base: float) -> dict[str, Any] | None:
    """The ``rope_scaling`` entry of config.json, or ``None``.

    GGUF keeps Llama 3's frequency scaling only as a table of divisors. Its rule (Llama 3.1
    reference code) has four parameters, three of them the same in every published model, so the
    largest divisor gives the fourth; the table is then computed again and compared.
    """
    arch = shape.arch
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    table = file.tensors.get("rope_freqs.weight")
    if kind == "linear" and table is None:
        factor = file.need(f"{arch}.rope.scaling.factor", float)
        return {"type": "linear", "factor": factor}
    if kind != "none":
        raise file.bad(f"rotary scaling of type {kind} is not supported; none and linear are")
    if table is None:
        return None
    divisors = np.asarray(table.data, dtype=np.float64).reshape(-1)
    if divisors.size != shape.head_dim // 2 or not np.all(np.isfinite(divisors)):
        raise file.bad("the tensor rope_freqs.weight has an unexpected shape")
    factor = float(np.round(divisors.max(), 3))
    low, high, original = 1.0, 4.0, 8192
    table_again = llama3_divisors(base, shape.head_dim, factor, low, high, original)
    if not np.allclose(table_again, divisors, rtol=1e-3):
        raise file.bad("its rotary frequencies (rope_freqs.weight) are not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _token_id(file: _File, name: str, count: int) -> int | None:
    value: int | None = file.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is not None and not 0 <= value < count:
        raise file.bad(f"the {name} token {value} is outside the vocabulary of {count}")
    return value


def _config(
    file: _File, shape: Shape, bits_of: dict[str, int], tokens: list[str]
) -> dict[str, Any]:
    arch = shape.arch
    base = float(file.get(f"{arch}.rope.freq_base", float, 10000.0))
    epsilon = float(file.need(f"{arch}.attention.layer_norm_rms_epsilon", float))
    if not (np.isfinite(base) and base > 0 and np.isfinite(epsilon) and epsilon >= 0):
        raise file.bad(f"rotary base {base} or norm epsilon {epsilon} cannot be")
    ends = [_token_id(file, name, len(tokens)) for name in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {
        "model_type": arch,
        "architectures": [ARCHITECTURES[arch]],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        # Shortest decimal of the float32 that the file holds: 1e-05 and not 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "vocab_size": shape.vocab,
        "rope_theta": base,
        "max_position_embeddings": file.size(f"{arch}.context_length", 2048),
        "tie_word_embeddings": shape.tied,
        "bos_token_id": _token_id(file, "bos", len(tokens)),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": _token_id(file, "padding", len(tokens)),
    }
    if scaling := _rope_scaling(file, shape, base):
        config["rope_scaling"] = scaling
    if bits_of:
        default = 4 if 4 in bits_of.values() else 8
        quantization: dict[str, Any] = {"group_size": GROUP, "bits": default, "mode": "affine"}
        for module, bits in bits_of.items():
            if bits != default:
                quantization[module] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
        config["quantization"] = config["quantization_config"] = quantization
    return config


def pre_tokenizer(kind: str) -> Any:
    """The ``tokenizers`` pre-tokenizer of one of :data:`PRETOKENIZERS`."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    split = PRETOKENIZERS[kind]
    if split == "gpt2":
        return pre.ByteLevel(add_prefix_space=False)
    if split == "digits+gpt2":
        return pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    return pre.Sequence(
        [
            pre.Split(Regex(split), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def ignores_merges(kind: str) -> bool:
    """Whether a pre-tokenizer's models take a whole word that is a token without merging to it."""
    return PRETOKENIZERS[kind] == _LLAMA3


def _write_tokenizer(file: _File, shape: Shape, tokens: list[str], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a byte-level BPE vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing

    kind = file.need("tokenizer.ggml.pre", str)
    split = PRETOKENIZERS.get(kind)
    if split is None or (shape.arch == "qwen2" and split is not _QWEN2):
        raise file.bad(
            f"the tokenizer kind {kind} is not supported for {shape.arch}; "
            f"supported are {', '.join(PRETOKENIZERS)} (qwen2 models: qwen2)"
        )
    types = file.need("tokenizer.ggml.token_type", list)
    merges = [tuple(m.split(" ", 1)) for m in file.need("tokenizer.ggml.merges", list)]
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise file.bad("its vocabulary has duplicate tokens or lacks token types")
    # Unused ones fill the padding rows of the embedding; no text has them.
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    llama3 = ignores_merges(kind)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    except Exception as error:  # tokenizers raises the bare class
        raise file.bad(f"its merges do not fit its vocabulary ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    if split is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=number == CONTROL, normalized=False)
            for token, number in zip(tokens, types, strict=True)
            if number in (CONTROL, USER_DEFINED)
        ]
    )
    names = {
        "bos_token": _token_id(file, "bos", len(tokens)),
        "eos_token": _token_id(file, "eos", len(tokens)),
        "pad_token": _token_id(file, "padding", len(tokens)),
        "unk_token": _token_id(file, "unknown", len(tokens)),
    }
    bos = names["bos_token"]
    # llama.cpp adds the first token for Llama 3's tokenizer unless the file says otherwise.
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, llama3):
        tokenizer.post_processor = TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", tokens[bos], "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer" if split is _QWEN2 else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": file.size(f"{shape.arch}.context_length", 2048),
        **{name: tokens[number] for name, number in names.items() if number is not None},
    }
    template = file.get("tokenizer.chat_template", str)
    if template:
        settings["chat_template"] = template
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def convert(gguf_path: Path, out_dir: Path) -> None:
    """Write a GGUF file's model as an mlx-lm directory that ``mlx_lm.load`` opens unchanged.

    ``out_dir`` appears complete or not at all; where another process has made it meanwhile, that
    one stays.

    Args:
        gguf_path: a llama or qwen2 file whose tensors are F32, F16, BF16, Q4_0, Q4_1 or Q8_0.
        out_dir: the directory to make.

    Raises:
        UserError: the file is missing, damaged, or holds something that is not supported.
    """
    from mlx_fd.models.backend import backend

    backend()
    import mlx.core as mx

    file = _File(gguf_path)
    shape = _shape(file)
    model = file.need("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise file.bad(f"the tokenizer model {model} is not supported; gpt2 (byte-level BPE) is")
    tokens = file.need("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise file.bad("its vocabulary is not a list of strings")
    if len(tokens) > shape.vocab:
        raise file.bad(f"{len(tokens)} tokens but only {shape.vocab} rows in token_embd.weight")
    weights, bits_of = _weights(file, shape)
    config = _config(file, shape, bits_of, tokens)
    with new_directory(out_dir) as working:
        _write_tokenizer(file, shape, tokens, working)
        (working / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        mx.save_safetensors(str(working / "model.safetensors"), weights, metadata={"format": "mlx"})
