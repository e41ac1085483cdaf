"""Whether weights are quantised in a way that mlx-lm reads, by config.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.directory import read_object

_HF_QUANT_CONFIG = "hf_quant_config.json"
# Entries that tell the published forms of a method apart, with what is meant where one is missing.
_TOLD_APART: dict[str, dict[str, Any]] = {
    "fp8": {"weight_block_size": None},
    "compressed-tensors": {"format": None},
    "modelopt": {"quant_algo": None},
    "awq": {"bits": 4, "version": "gemm"},
}
_PACKED_INTEGERS = "quant_method compressed-tensors, format pack-quantized"
_AWQ = "quant_method awq, bits 4, version gemm"
READERS: dict[str, tuple[str, ...]] = {
    "quant_method fp8, weight_block_size [128, 128]": (
        *("deepseek_v3", "deepseek_v32", "glm_moe_dsa"),
        *("mimo_v2_flash", "minimax", "mistral4"),
    ),
    "quant_method fp8, weight_block_size None": ("mistral4",),
    "quant_method fp8, weight_block_size [32, 32]": ("deepseek_v41",),
    _PACKED_INTEGERS: ("deepseek_v3", "mistral4"),
    "quant_method compressed-tensors, format mxfp4-pack-quantized": ("kimi_k3",),
    "quant_method modelopt, quant_algo NVFP4": ("muse_spark",),
    "quant_method mxfp4": ("gpt_oss",),
    "quant_method mxfp8": ("minimax_m3_vl",),
}
"""Published forms, and the modules of ``mlx_lm.models`` that make weights of them.

Others pass them over, or take the bytes of FP8 for numbers (ministral3).
"""
# Forms that mlx-lm reads itself, for all classes. GPTQ is none of them: it takes it for AWQ.
_FOR_ALL = ("quant_method bitnet", _AWQ)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# A multiple of every size of groups.
_COLUMNS = 512


def _forms(quantization: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every form of mlx-lm's entry with the module that has it; the whole model's first."""
    yield "the weights", quantization
    for module, form in quantization.items():
        if isinstance(form, Mapping):
            # Of what it leaves out MLX's own defaults are taken, not the other weights' form.
            yield module, form


def with_quantization_file(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration with what ModelOpt keeps beside it, where mlx-lm looks for that.

    Args:
        config: what config.json holds.
        folder: where it is from.

    Raises:
        UserError: hf_quant_config.json cannot be read.
    """
    file = folder / _HF_QUANT_CONFIG
    if "quantization" in config or _published(config) is not None or not file.exists():
        return dict(config)
    return {**config, "quantization_config": read_object(file)}


def _published(config: Mapping[str, Any]) -> Any:
    """A ``quantization_config`` of others than mlx-lm's, where mlx-lm looks for it."""
    part = config.get("text_config")
    inner = part.get("quantization_config") if isinstance(part, Mapping) else None
    return config.get("quantization_config", inner)


def _named(published: Mapping[str, Any]) -> str:
    """A published form as :data:`READERS` calls it."""
    settings = published.get("quantization")
    settings = settings if isinstance(settings, Mapping) else published
    method = published.get("quant_method")
    named = [f"quant_method {method}"]
    for key, default in _TOLD_APART.get(str(method), {}).items():
        value = settings.get(key, default)
        named.append(f"{key} {value.lower() if key == 'version' and value else value}")
    return ", ".join(named)


def _is_symmetric_of_4_bits(published: Mapping[str, Any]) -> bool:
    """Whether packed integers are those that mlx-lm takes all of them for."""
    groups = published.get("config_groups")
    weights = [one.get("weights") for one in groups.values()] if isinstance(groups, Mapping) else []
    return bool(weights) and all(
        one and one.get("num_bits") == 4 and one.get("symmetric", True) for one in weights
    )


def _check_published(config: Mapping[str, Any], file: Path, reader: str, instead: str) -> None:
    published = _published(config)
    if not published:
        return
    if not isinstance(published, Mapping):
        raise UserError(f"{file}: quantization_config is {published!r:.80}, no object; {instead}")
    form = _named(published)
    fault = ""
    if form not in _FOR_ALL and reader not in READERS.get(form, ()):
        fault = f"{form}, which mlx-lm does not read for {reader} models"
    elif form == _PACKED_INTEGERS and not _is_symmetric_of_4_bits(published):
        fault = f"{form}, and mlx-lm reads symmetric ones of 4 bits alone"
    elif form == _AWQ and any(config.get(name) for name in _EXPERTS):
        fault = f"{form}, which mlx-lm does not read for experts"
    if fault:
        raise UserError(f"{file}: its weights are quantised with {fault}; {instead}")


def _is_count(value: Any) -> bool:
    """Whether a number of bits or of weights can be one; where it is missing, MLX has its own."""
    return value is None or (type(value) is int and value > 0)


def check_quantization(config: Mapping[str, Any], file: Path, reader: str) -> None:
    """Make sure that mlx-lm makes weights of what a configuration says they are.

    Args:
        config: what config.json holds, and :func:`with_quantization_file` adds.
        file: where it is from, for messages.
        reader: the module of ``mlx_lm.models`` that has the language model's arguments.

    Raises:
        UserError: it does not, or MLX has no such format.
    """
    import mlx.core as mx

    instead = "take the unquantised model, or an mlx-community conversion"
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        _check_published(config, file, reader, instead)
        return
    for module, form in _forms(quantization):
        bits, group, mode = form.get("bits"), form.get("group_size"), form.get("mode", "affine")
        try:
            # MLX divides by what it is given, and a division by zero ends the process. What the
            # whole model's form leaves out mlx-lm does not have.
            counts = _is_count(bits) and _is_count(group)
            if not counts or (form is quantization and None in (bits, group)):
                raise ValueError("no count")
            # Of the form alone: nothing is computed.
            mx.quantize(mx.zeros((1, _COLUMNS)), group, bits, mode=mode)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file}: {module} are quantised as {mode} with {bits} bits in groups of {group}, "
                f"which MLX does not have; {instead}"
            ) from error
