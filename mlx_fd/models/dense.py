"""Quantised weights as float32 numbers, whatever their mode (affine, mxfp4, nvfp4, mxfp8).

mlx-lm's own ``dequantize_model`` gives bfloat16 for the floating-point modes, which rounds what is
added to them later, and leaves nvfp4's global scale out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn


def _numbers(module: nn.Module) -> mx.array:
    """The weights of a quantised module, in float32."""
    import mlx.core as mx

    dequantized = partial(
        mx.dequantize,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        dtype=mx.float32,
    )
    weight, scales, biases = module.weight, module.scales, module.get("biases")
    if biases is not None:
        # From 16-bit ones the products would be rounded to 16 bits.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    scale = module.get("global_scale")
    if scale is None or scale.ndim == 0:
        return dequantized(weight, scales, biases, global_scale=scale)
    # One of each expert's.
    parts = zip(weight, scales, scale, strict=True)
    return mx.stack([dequantized(w, s, global_scale=g) for w, s, g in parts])


def dequantize(model: nn.Module) -> nn.Module:
    """Replace a model's quantised modules by dense ones in float32; weights stay lazy.

    Args:
        model: the model, changed in place.

    Returns:
        The same model.
    """
    from mlx import nn
    from mlx.utils import tree_unflatten
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    packed = (
        *(nn.QuantizedLinear, nn.QuantizedEmbedding),
        *(QuantizedSwitchLinear, QuantizedMultiLinear),
    )
    dense: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, packed):
            continue
        weight = _numbers(module)
        sizes, has_bias = weight.shape[::-1], "bias" in module
        if isinstance(module, nn.QuantizedEmbedding):
            replaced: nn.Module = nn.Embedding(*sizes[::-1])
        elif isinstance(module, QuantizedSwitchLinear):
            replaced = SwitchLinear(*sizes, bias=has_bias)
        elif isinstance(module, QuantizedMultiLinear):
            replaced = MultiLinear(*sizes)
        else:
            replaced = nn.Linear(*sizes, bias=has_bias)
        replaced.weight = weight
        if has_bias:
            replaced.bias = module.bias
        dense.append((name, replaced))
    if dense:
        model.update_modules(tree_unflatten(dense))
    return model
