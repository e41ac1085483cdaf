"""Families of models as transformers and llama.cpp have them, one file each.

mlx-lm opens many architectures; what the same model is called elsewhere, and how its numbers lie
there, is what a family says. ``hf``, PEFT and GGUF exports and the reading of GGUF files know the
families here, and refuse the others. Names of tensors in GGUF files are the ``gguf`` package's own
(``gguf.get_tensor_name_map``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_fd import registry
from mlx_fd.registry import Entry, Registry

if TYPE_CHECKING:
    import mlx.core as mx

Weights = dict[str, "mx.array"]


class Key(NamedTuple):
    """An entry of a GGUF file's metadata that is one of config.json.

    Attributes:
        name: its key, without the architecture before it.
        option: the entry of config.json, and of mlx-lm's ``ModelArgs``.
        kind: ``int`` for a count, ``float`` for a number that is not negative.
        default: what llama.cpp takes where a file has none; ``None``: it must be there.
    """

    name: str
    option: str
    kind: type
    default: Any = None


COMMON = (
    Key("context_length", "max_position_embeddings", int, 2048),
    Key("embedding_length", "hidden_size", int),
    Key("block_count", "num_hidden_layers", int),
    Key("feed_forward_length", "intermediate_size", int),
    Key("attention.head_count", "num_attention_heads", int),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Key("rope.freq_base", "rope_theta", float, 10000.0),
)
"""What every family has."""


def _as_it_is(weights: Weights) -> Weights:
    return weights


def neighbouring_pairs(args: Any) -> str | None:
    """Whether a model rotates neighbouring pairs, which only mlx-lm can be told to."""
    if getattr(args, "rope_traditional", False):
        return "rotates the halves of a head, and this model neighbouring pairs"
    return None


def _complete(config: dict[str, Any]) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family(Entry):
    """A family; its name is mlx-lm's ``model_type``.

    Attributes:
        hf_class: transformers' class.
        gguf: what llama.cpp calls the architecture.
        keys: metadata of a GGUF file beyond :data:`COMMON`.
        constants: entries of config.json that a GGUF file has no place for: a model must have
            these values to be written, and one that was read gets them.
        biases: option of config.json -> the module of a block whose bias is there where it is true.
        pairs: llama.cpp rotates neighbouring pairs: rows of q and k are interleaved in its files.
        norm_shift: added to the weights of norms there (Gemma's norms multiply by 1 + w).
        scaled_in_transformers: its class there scales rotary positions where config.json does not
            say anything of it.
        rope: kinds of rotary scaling that llama.cpp computes as mlx-lm does.
        check: what of a model's ``ModelArgs`` llama.cpp would compute otherwise, as the rest of a
            sentence that begins with "llama.cpp"; ``None``: nothing.
        check_hf: the same of transformers.
        complete: adds to a config.json that was made of a GGUF file what follows from the rest.
        modules: parts of mlx-lm's names of modules -> what they are in transformers' checkpoints.
        to_hf: mlx-lm's weights under transformers' names, in its shapes.
        from_hf: the way back, where mlx-lm cannot read what transformers writes; ``None``: it can.
        mxfp4: part of the names of modules that transformers keeps in MXFP4; empty: none.
        blocks_to_hf: their blocks [..., groups, 16] and scales [..., groups], both uint8, as
            ``.weight`` and ``.scales`` under mlx-lm's names, under transformers' names.
        not_in_peft: modules (names within a block) that are no ``torch.nn.Linear`` in transformers,
            so that PEFT's format has no place for LoRA on them.
    """

    hf_class: str
    gguf: str
    keys: tuple[Key, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    pairs: bool = False
    norm_shift: float = 0.0
    scaled_in_transformers: bool = False
    rope: frozenset[str] = frozenset({"default", "linear", "yarn"})
    check: Callable[[Any], str | None] = neighbouring_pairs
    check_hf: Callable[[Any], str | None] = neighbouring_pairs
    complete: Callable[[dict[str, Any]], None] = _complete
    modules: Mapping[str, str] = field(default_factory=dict)
    to_hf: Callable[[Weights], Weights] = _as_it_is
    from_hf: Callable[[Weights], Weights] | None = None
    mxfp4: str = ""
    blocks_to_hf: Callable[[Weights], Weights] = _as_it_is
    not_in_peft: frozenset[str] = frozenset()


FAMILIES: Registry[Family] = registry.FAMILIES
register_family = FAMILIES.register
