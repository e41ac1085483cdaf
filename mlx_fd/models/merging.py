"""LoRA within the weights, where that is less work than beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.lora import LoRALinear

from mlx_fd.models.lora import LoraDropout
from mlx_fd.models.stand_ins import ModulePath, StandIn, modules, replaced

# Bytes of weights that may be copied for as long as a text is written.
_COPIED = 64 * 2**20
# How many products with r (d_in + d_out) numbers LoRA takes for itself, the passes over
# activations counted in.
_MERGES = 4


class _Merged(StandIn):
    """Stands in for a linear module with LoRA: one product, differentiable by the matrices."""

    def __init__(self, module: LoRALinear):
        super().__init__(module)
        linear = module.linear
        self._weight = linear.weight + (module.scale * module.lora_b.T) @ module.lora_a.T
        self._bias = linear.get("bias")

    def __call__(self, x: mx.array) -> mx.array:
        made: mx.array = x @ self._weight.T
        return made if self._bias is None else made + self._bias


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """LoRA within the weights while this is open, where a copy of them costs little.

    In a small model's step of writing each operation counts: one product in the place of three.
    Only of float32 weights, which lose nothing by it.
    """
    made = {path: module.fuse() for path, module in _light(model).items()}
    mx.eval([module.parameters() for module in made.values()])
    with replaced(model, made):
        yield


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """LoRA within the weights for a pass that is differentiated, where that is less work.

    The gradient by the weights W + s BA gives that by A and B. It takes a product of all tokens
    with d_in d_out numbers, where LoRA's own path takes three with r (d_in + d_out) and goes over
    all activations five times more. Nothing is merged where LoRA has dropout.
    """
    with replaced(
        model,
        {
            path: _Merged(module)
            for path, module in _light(model).items()
            if _gains(module) and not isinstance(module.dropout, LoraDropout)
        },
    ):
        yield


def _light(model: nn.Module) -> dict[ModulePath, LoRALinear]:
    """The modules with LoRA on float32 weights, where a copy of all of those costs little."""
    found = {
        path: module
        for path, module in modules(model)
        if isinstance(module, LoRALinear)
        and isinstance(module.linear, nn.Linear)
        and module.linear.weight.dtype == mx.float32
    }
    copied = sum(module.linear.weight.nbytes for module in found.values())
    return found if copied <= _COPIED else {}


def _gains(module: LoRALinear) -> bool:
    wide, long = module.linear.weight.shape
    least: int = _MERGES * module.lora_a.shape[1] * (wide + long)
    return bool(wide * long <= least)
