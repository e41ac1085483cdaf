"""Is a model of mlx-lm the one that its configuration describes? No weight is read.

mlx-lm's classes read some entries of config.json and pass over others, each in its own way. Here
the modules that they made are compared with the entries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_fd.errors import UserError
from mlx_fd.models.published_config import (
    BASE_FIELDS,
    LOCAL_BASE_FIELDS,
    PARTIAL_FIELDS,
    language_part,
    rope_kind,
)
from mlx_fd.models.rope_scaling import UNSCALED
from mlx_fd.models.view import find_blocks

# Feed-forward layers multiply a gate with something: names of the gate's activation in config.json,
# and where the functions are told apart. The forms of GELU are one here.
_ACTIVATION_FIELDS = ("hidden_activation", "hidden_act")
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), nn.silu),
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), nn.gelu),
    **dict.fromkeys(("relu", "fatrelu"), nn.relu),
    "relu2": nn.relu2,
}
_GATES = (-2.0, -0.7, 0.5, 3.0)
_SAME_ACTIVATION = 1e-2


def check_model(model: nn.Module, config: Mapping[str, Any], file: Path) -> None:
    """Make sure that a model turns positions, mixes layers and gates as its configuration says.

    Args:
        model: mlx-lm's, of that configuration.
        config: of :func:`mlx_fd.models.published_config.read_config`.
        file: where it is from, for messages.

    Raises:
        UserError: it does not; it is another model than the one that was published.
    """
    part = language_part(config)
    for made, says in (
        *_wrong_positions(model, part),
        *_wrong_layers(model, part),
        *_wrong_activation(model, part),
    ):
        raise UserError(
            f"{file}: mlx-lm makes a {part.get('model_type')} model {made}, and the configuration "
            f"says {says}: it would be another model than the published one; use a model of "
            "another architecture"
        )


def _wrong_positions(model: nn.Module, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is not as published: how the model is made, and what the configuration says of it."""
    ropes = [
        module
        for name, module in model.named_modules()
        if "vision" not in name and _turns(type(module).__name__)
    ]
    plain = [rope for rope in ropes if type(rope) is nn.RoPE]
    parameters = part.get("rope_parameters") or {}
    by_type = [one for one in parameters.values() if isinstance(one, Mapping)] or [parameters]

    bases = [part.get(name) for name in (*BASE_FIELDS, *LOCAL_BASE_FIELDS)]
    bases = [*bases, *(one.get("rope_theta") for one in by_type)]
    stated = {float(base) for base in bases if isinstance(base, int | float)}
    for rope in plain:
        if stated and float(rope.base) not in stated:
            yield f"with the rotary base {rope.base:g}", " and ".join(map(str, sorted(stated)))

    scaled = [
        one
        for one in (part.get("rope_scaling") or {}, *by_type)
        if rope_kind(one) not in UNSCALED and one.get("factor", 2) != 1
    ]
    if scaled and ropes and len(plain) == len(ropes) and all(rope.scale == 1 for rope in plain):
        yield "without scaled positions", f"that they are scaled ({rope_kind(scaled[0])})"

    for one in scaled:
        says = one.get("attention_factor")
        if not isinstance(says, int | float):
            continue
        for factor in {getattr(rope, "mscale", says) for rope in ropes}:
            if not math.isclose(factor, says, rel_tol=1e-3):
                yield (
                    f"that multiplies queries and keys by {factor:.4g}",
                    f"attention_factor {says}",
                )

    share = next((part[name] for name in PARTIAL_FIELDS if part.get(name) is not None), None)
    share = by_type[0].get("partial_rotary_factor", share) if len(by_type) == 1 else share
    heads, hidden = part.get("num_attention_heads"), part.get("hidden_size")
    if isinstance(share, float) and isinstance(heads, int) and isinstance(hidden, int):
        width = part.get("head_dim") or hidden // heads
        if share < 1 and plain and all(rope.dims == width for rope in plain):
            yield f"that turns all {width} dimensions of a head", f"partial_rotary_factor {share}"


def _wrong_layers(model: nn.Module, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """As for positions, of what each layer keeps of a text and whether it turns positions."""
    from mlx_lm.models.cache import make_prompt_cache

    blocks = find_blocks(model)
    types = part.get("layer_types")
    caches = make_prompt_cache(model)
    if isinstance(types, list) and len(types) == len(blocks) == len(caches):
        keeps: dict[str, str] = {}
        for index, (kind, cache) in enumerate(zip(types, caches, strict=True)):
            name = type(cache).__name__
            if keeps.setdefault(str(kind), name) != name:
                yield (
                    f"whose layer {index} keeps a {name} and an earlier one of its type a "
                    f"{keeps[str(kind)]}",
                    f"that both are {kind!r:.40}",
                )
    turning = part.get("no_rope_layers")
    if isinstance(turning, list) and len(turning) == len(blocks):
        for index, (turns, block) in enumerate(zip(turning, blocks, strict=True)):
            made = any(_turns(type(module).__name__) for _, module in block.named_modules())
            if made != bool(turns):
                yield (
                    f"whose layer {index} {'turns' if made else 'does not turn'} positions",
                    f"{turns} for it in no_rope_layers",
                )


def _wrong_activation(model: nn.Module, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """As for positions, of what becomes of a gate: most classes have one function for all."""
    says = next((part[name] for name in _ACTIVATION_FIELDS if part.get(name)), None)
    wanted = _ACTIVATIONS.get(says) if isinstance(says, str) else None
    if wanted is None:
        return
    gates, kinds = mx.array([[_GATES]]), set()
    for name, module in model.named_modules():
        if "vision" in name or not {"gate_proj", "up_proj", "down_proj"} <= set(module):
            continue
        if type(module) in kinds:
            continue
        kinds.add(type(module))
        made = _gated(module, gates)
        found = [
            name
            for name, function in _ACTIVATIONS.items()
            if made is not None
            and made.shape == gates.shape
            and (mx.abs(made - function(gates)).max() < _SAME_ACTIVATION).item()
        ]
        # What is none of these (gpt-oss has its own) is the architecture's.
        if found and says not in found:
            yield f"with the activation {found[0]}", f"{says!r:.40}"


def _gated(module: nn.Module, gates: mx.array) -> mx.array | None:
    """What a feed-forward layer makes of gates [1, 1, n] where all else is 1; ``None``: unknown."""
    bare: Any = copy.copy(module)
    bare.gate_proj = lambda *_: gates
    bare.up_proj = lambda *_: mx.ones_like(gates)
    bare.down_proj = lambda x, *_: x
    try:
        if isinstance(module, SwitchGLU):
            made: Any = module.activation(mx.ones_like(gates), gates)
        else:
            made = bare(gates)
    except Exception:  # whatever else such a layer does
        return None
    return made if isinstance(made, mx.array) else None


def _turns(class_name: str) -> bool:
    return any(word in class_name.lower() for word in ("rope", "rotary"))
