"""gpt-oss: experts, attention sinks, windows in every second layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_fd.models.families import Family, Key, register_family

if TYPE_CHECKING:
    from mlx_fd.models.families import Weights

_KINDS = ("sliding_attention", "full_attention")
_EXPERTS = ".mlp.experts."


def check(args: Any) -> str | None:
    """Which layers attend to a window, which its files do not say."""
    layers = args.num_hidden_layers
    if list(args.layer_types or _KINDS * (layers // 2)) != [_KINDS[i % 2] for i in range(layers)]:
        return "attends to a window in layers 0, 2, 4 and so on, and this model in others"
    return None


def to_hf(weights: Weights) -> Weights:
    """Gate and up of the experts in one tensor, their columns in turn; inputs before outputs."""
    import mlx.core as mx

    written = {}
    for name, array in weights.items():
        before, merged, part = name.partition(_EXPERTS)
        if not merged:
            written[name] = array
        elif part == "down_proj.weight":
            written[f"{before}{_EXPERTS}down_proj"] = array.swapaxes(-1, -2)
        elif part == "down_proj.bias":
            written[f"{before}{_EXPERTS}down_proj_bias"] = array
        elif part.startswith("gate_proj."):
            up = weights[f"{before}{_EXPERTS}{part.replace('gate', 'up', 1)}"]
            # [experts, outputs, ...] twice -> [experts, 2 outputs, ...], g0 u0 g1 u1 ...
            both = mx.stack([array, up], axis=2).flatten(1, 2)
            if part == "gate_proj.weight":
                written[f"{before}{_EXPERTS}gate_up_proj"] = both.swapaxes(-1, -2)
            else:
                written[f"{before}{_EXPERTS}gate_up_proj_bias"] = both
    return written


def blocks_to_hf(weights: Weights) -> Weights:
    """Gate and up in one tensor here, too; outputs before inputs."""
    import mlx.core as mx

    written = {}
    for name, array in weights.items():
        before, _, part = name.partition(_EXPERTS)
        module, _, kind = part.partition(".")
        suffix = "blocks" if kind == "weight" else "scales"
        if module == "down_proj":
            written[f"{before}{_EXPERTS}down_proj_{suffix}"] = array
        elif module == "gate_proj":
            up = weights[f"{before}{_EXPERTS}up_proj.{kind}"]
            both = mx.stack([array, up], axis=2).flatten(1, 2)
            written[f"{before}{_EXPERTS}gate_up_proj_{suffix}"] = both
    return written


def from_hf(weights: Weights) -> Weights:
    """The way back of :func:`to_hf`: mlx-lm reads experts in MXFP4 only."""
    read = {}
    for name, array in weights.items():
        before, merged, part = name.partition(_EXPERTS)
        module, _, bias = part.partition("_proj")
        suffix = "bias" if bias else "weight"
        if not merged:
            read[name] = array
            continue
        outputs_first = array if bias else array.swapaxes(-1, -2)
        if module == "down":
            read[f"{before}{_EXPERTS}down_proj.{suffix}"] = outputs_first
        else:
            read[f"{before}{_EXPERTS}gate_proj.{suffix}"] = outputs_first[:, ::2]
            read[f"{before}{_EXPERTS}up_proj.{suffix}"] = outputs_first[:, 1::2]
    return read


register_family(
    Family(
        name="gpt_oss",
        help="gpt-oss",
        order=100,
        hf_class="GptOssForCausalLM",
        gguf="gpt-oss",
        keys=(
            Key("expert_count", "num_local_experts", int),
            Key("expert_used_count", "num_experts_per_tok", int),
            Key("expert_feed_forward_length", "intermediate_size", int),
            Key("attention.sliding_window", "sliding_window", int),
        ),
        scaled_in_transformers=True,
        check=check,
        to_hf=to_hf,
        from_hf=from_hf,
        mxfp4=_EXPERTS,
        blocks_to_hf=blocks_to_hf,
        not_in_peft=frozenset({"mlp.router"}),
    )
)
