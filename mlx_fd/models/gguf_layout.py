"""How a model's tensors lie in a GGUF file: their names, their rows, and blocks of 32 weights.

The layouts of blocks are those of ggml-common.h. Four are formats of MLX's, too, and their integers
are carried from one to the other:

    Q4_0: w = d (q - 8)    Q4_1: w = d q + m    Q8_0: w = d q    MXFP4: w = 2^e E2M1(q)

with d and m in float16. The first three are affine quantisation, the last mlx's mode "mxfp4".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlx_fd.models.families import Family

GROUP = 32
CARRIED = ("Q4_0", "Q4_1", "Q8_0", "MXFP4")
"""Types of GGUF that are one of MLX's formats."""


class Packed(NamedTuple):
    """A matrix in one of MLX's formats, in groups of 32.

    Attributes:
        integers: unsigned bytes [..., columns].
        scales: [..., columns / 32], float16; for mxfp4 its exponents, uint8.
        biases: [..., columns / 32], float16; ``None`` for mxfp4.
        bits: 4 or 8.
    """

    integers: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    bits: int


def tensor_names(family: Family, layers: int) -> Callable[[str], str | None]:
    """A function from mlx-lm's names of parameters to those in a file (``None``: it has none)."""
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.gguf]
    names = gguf.get_tensor_name_map(arch, layers)

    def name_of(parameter: str) -> str | None:
        for ours, in_file in family.modules.items():
            parameter = parameter.replace(ours, in_file)
        module, _, suffix = parameter.rpartition(".")
        if suffix not in ("weight", "bias"):
            # A parameter that is no module's, as attention sinks are.
            module, suffix = parameter, "weight"
        found = names.get_name(module)
        return None if found is None else f"{found}.{suffix}"

    return name_of


def interleaved_heads(family: Family, name: str, heads: int, kv_heads: int) -> int | None:
    """Heads over which a tensor's rows are interleaved in the file; ``None``: they are not.

    Args:
        family: the model's.
        name: the tensor's in the file.
        heads: of queries.
        kv_heads: of keys.
    """
    part = name.rpartition(".")[0].rpartition(".")[2]
    if not family.pairs or part not in ("attn_q", "attn_k"):
        return None
    return heads if part == "attn_q" else kv_heads


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two halves of every head in turn."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo :func:`interleave`: mlx-lm rotates the halves of a head against each other."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def is_norm(name: str) -> bool:
    """Whether a tensor of a file holds the weights of a norm."""
    return name.endswith("norm.weight")


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned bytes [..., columns] in MLX's packing: little end first in 32-bit words."""
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return np.ascontiguousarray(values).view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """MLX's 32-bit words [..., words] as unsigned bytes [..., columns]."""
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if bits == 8:
        return octets
    both = np.stack([octets & 15, octets >> 4], axis=-1)
    return both.reshape(*octets.shape[:-1], -1)


def from_blocks(data: np.ndarray, kind: str) -> Packed:
    """Split a file's blocks into what MLX's formats hold.

    Args:
        data: the file's bytes, [..., bytes per row].
        kind: one of :data:`CARRIED`.
    """
    import gguf

    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    leading = data.shape[:-1]
    block = data.reshape(*leading, -1, size)

    def half(at: int) -> np.ndarray:
        return np.ascontiguousarray(block[..., at : at + 2]).view(np.float16)[..., 0]

    def nibbles(at: int) -> np.ndarray:
        # The low halves of 16 bytes are the first half of a block.
        values = np.concatenate([block[..., at:] & 15, block[..., at:] >> 4], axis=-1)
        return values.reshape(*leading, -1)

    if kind == "MXFP4":
        return Packed(nibbles(1), np.ascontiguousarray(block[..., 0]), None, 4)
    scales = half(0)
    if kind == "Q4_1":
        return Packed(nibbles(4), scales, half(2), 4)
    if kind == "Q4_0":
        return Packed(nibbles(2), scales, scales * np.float16(-8), 4)
    # Adding 128 to a signed byte is flipping its sign bit.
    return Packed(
        (block[..., 2:] ^ 128).reshape(*leading, -1), scales, scales * np.float16(-128), 8
    )


def to_blocks(packed: Packed, kind: str) -> np.ndarray:
    """The bytes of a file's blocks [..., bytes per row]; :func:`from_blocks` undoes it."""
    leading = packed.integers.shape[:-1]
    values = packed.integers.reshape(*leading, -1, GROUP)
    if kind == "MXFP4":
        parts = [packed.scales[..., None]]
    else:
        heads = [packed.scales, packed.biases] if kind == "Q4_1" else [packed.scales]
        parts = [
            np.ascontiguousarray(head)[..., None].view(np.uint8)
            for head in heads
            if head is not None
        ]
    if kind == "Q8_0":
        parts.append(values ^ 128)
    else:
        parts.append(values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4)
    return np.concatenate(parts, axis=-1).reshape(*leading, -1)
