"""Whether weights are quantised in a way that mlx-lm reads, by config.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError

# Those of mlx_lm.utils.load_model. An fp8 model is read where its class dequantises it.
_METHODS = ("bitnet", "mxfp4", "mxfp8", "fp8", "compressed-tensors", "modelopt", "awq", "gptq")
_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")
_ALGORITHMS = ("NVFP4",)
# A multiple of every size of groups.
_COLUMNS = 512


def _forms(quantization: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every form of mlx-lm's entry with the module that has it; the whole model's first."""
    yield "the weights", quantization
    for module, form in quantization.items():
        if isinstance(form, Mapping):
            # Of what it leaves out MLX's own defaults are taken, not the other weights' form.
            yield module, form


def _what_is_unknown(published: Mapping[str, Any]) -> str | None:
    """What of a ``quantization_config`` of others than mlx-lm's mlx-lm does not read."""
    method = published.get("quant_method")
    if method is None:
        return None
    settings = published.get("quantization")
    settings = settings if isinstance(settings, Mapping) else published
    for named, says, known in (
        ("quant_method", method, _METHODS),
        ("format", published.get("format"), _FORMATS if method == "compressed-tensors" else None),
        ("quant_algo", settings.get("quant_algo"), _ALGORITHMS if method == "modelopt" else None),
    ):
        if known is not None and says not in known:
            return f"{named} {says}"
    return None


def _is_count(value: Any) -> bool:
    """Whether a number of bits or of weights can be one; where it is missing, MLX has its own."""
    return value is None or (type(value) is int and value > 0)


def check_quantization(config: Mapping[str, Any], file: Path) -> None:
    """Make sure that MLX has the formats that a configuration says its weights are in.

    Args:
        config: what config.json holds.
        file: where it is from, for messages.

    Raises:
        UserError: it has not.
    """
    import mlx.core as mx

    instead = "take the unquantised model, or an mlx-community conversion"
    quantization = config.get("quantization")
    if not isinstance(quantization, Mapping):
        published = config.get("quantization_config")
        unknown = _what_is_unknown(published) if isinstance(published, Mapping) else None
        if unknown:
            raise UserError(
                f"{file}: its weights are quantised with {unknown}, which mlx-lm does not read; "
                f"{instead}"
            )
        return
    for module, form in _forms(quantization):
        bits, group, mode = form.get("bits"), form.get("group_size"), form.get("mode", "affine")
        try:
            # MLX divides by what it is given, and a division by zero ends the process.
            if not (_is_count(bits) and _is_count(group)):
                raise ValueError("no count")
            # Of the form alone: nothing is computed.
            mx.quantize(mx.zeros((1, _COLUMNS)), group, bits, mode=mode)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file}: {module} are quantised as {mode} with {bits} bits in groups of {group}, "
                f"which MLX does not have; {instead}"
            ) from error
