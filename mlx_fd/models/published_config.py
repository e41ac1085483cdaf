"""config.json as it is published, and as mlx-lm reads it.

The hub's config.json files are written for transformers, in the words of the version that wrote
them. mlx-lm reads the entries that its own ``ModelArgs`` classes name, passes over all others
without a word, and takes a default of its own where one is missing: of a llama model that
transformers 5 has saved it takes the rotary base 10000. Here the words are translated, by the
fields that those classes have, and what cannot be said in them is refused. No weight is read.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend
from mlx_fd.models.directory import AGAIN, CONFIG, blaming, read_header, read_object
from mlx_fd.models.quantization import check_quantization, with_quantization_file
from mlx_fd.models.rope_scaling import UNSCALED, for_short_texts, is_for_short_texts

# Names that mlx-lm's classes have for what transformers calls by the first of each.
BASE_FIELDS = ("rope_theta", "rotary_emb_base", "rope_embedding_base", "rope_freq_constant")
PARTIAL_FIELDS = ("partial_rotary_factor", "rotary_pct")
# The rotary base of the sliding layers, where a model has two.
LOCAL_BASE_FIELDS = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
_PERIOD_FIELDS = ("sliding_window_pattern", "full_attention_interval")
# Scalings that begin at a length, which mlx-lm looks for in their own entry alone.
_FROM_A_LENGTH = ("yarn", "llama3")
_ORIGINAL = "original_max_position_embeddings"
# Entries that transformers 5 has under another name, or not at all.
_SYNONYMS = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "block_dim": "hidden_size",
}
_LAYER_NAMES = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
# Entries that mlx-lm gives another value than transformers where they are missing: recurrences
# would have steps of at least 0.001, of which the published model knows nothing.
_MISSING: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"time_step_limit": [0.0, math.inf]},
}
# Entries that a class passes over, with the one value for which it makes the published model.
_PASSED_OVER: dict[str, dict[str, Any]] = {
    **{name: {"norm_topk_prob": False} for name in ("qwen2_moe", "deepseek", "deepseek_v2")},
    "olmoe": {"clip_qkv": None},
    "gemma3_text": {
        **{"final_logit_softcapping": None, "attn_logit_softcapping": None},
        "use_bidirectional_attention": False,
    },
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
}
# An entry that the weights' names may answer.
_TIED = "tie_word_embeddings"
_HEADS = ("lm_head", "output", "embed_out")


def read_config(path: Path) -> dict[str, Any]:
    """A model directory's config.json as mlx-lm reads it.

    Args:
        path: the directory.

    Returns:
        As :func:`as_mlx_lm_reads`. Where config.json does not say whether the embedding is the
        head, the weights' names do.

    Raises:
        UserError: it cannot be read, or mlx-lm cannot be told what it says.
    """
    file = path / CONFIG
    config = with_quantization_file(read_object(file), path)
    has_head = None
    if config.get(_TIED) is None and language_part(config).get(_TIED) is None:
        shards = sorted(path.glob("model*.safetensors"))
        names = [name for shard in shards for name in read_header(shard)]
        has_head = any(_is_head(name) for name in names) if names else None
    return as_mlx_lm_reads(config, file, has_head=has_head)


def _is_head(name: str) -> bool:
    """Whether a weight's name is that of a head; blocks may have an ``output`` of their own."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return kind in ("weight", "scales") and last in _HEADS and (last == module or last == _HEADS[0])


def text_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What a configuration says of the language model alone, in one flat dictionary.

    Args:
        config: of :func:`read_config`.
        file: where it is from, for messages.

    Returns:
        The entries of ``text_config`` beside those of the wrapper around it, where there is one.
        What is missing has the value that mlx-lm gives it.

    Raises:
        UserError: an entry is missing that mlx-lm has no default for.
    """
    part = language_part(config)
    if part is config:
        flat = dict(config)
    else:
        outer = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
        kept = ("quantization", "quantization_config", "mlx_fd")
        outer |= {key: config[key] for key in kept if key in config}
        flat = {**outer, **part}
    with blaming(f"{file}: mlx-lm cannot make a model of it", AGAIN):
        args = _text_arguments(config, file)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is not None:
            flat[field.name] = value
    return flat


def ignored_window(config: Mapping[str, Any], file: Path) -> int | None:
    """The window that layers were made to read, where mlx-lm lets them read everything.

    Up to so many tokens it is the same.

    Args:
        config: of :func:`read_config`.
        file: where it is from, for messages.

    Returns:
        Tokens; ``None``: there is no window, or mlx-lm keeps to it.
    """
    part = language_part(config)
    window, types = part.get("sliding_window"), part.get("layer_types")
    if type(window) is not int or window < 1 or part.get("use_sliding_window") is False:
        return None
    if isinstance(types, list) and "sliding_attention" not in types:
        return None
    args = _text_arguments(config, file)
    if "sliding_window" not in _field_names(type(args)):
        return window
    # llama, which mlx-lm takes for mistral, too, has windows in the layers that are said to.
    made = getattr(args, "layer_types", None)
    return window if isinstance(made, list) and "sliding_attention" not in made else None


def short_text_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens of a text that longrope's factors for short texts are for.

    Longer texts have others in the published model, and mlx-lm has one set for all.

    Args:
        config: of :func:`read_config`.

    Returns:
        Tokens; ``None``: all texts have the same factors.
    """
    part = language_part(config)
    scaling = part.get("rope_scaling")
    if not isinstance(scaling, dict) or not is_for_short_texts(scaling):
        return None
    length = part.get(_ORIGINAL) or scaling.get(_ORIGINAL)
    return length if type(length) is int else None


def as_mlx_lm_reads(
    config: Mapping[str, Any], file: Path, *, has_head: bool | None = None
) -> dict[str, Any]:
    """A published configuration in the words that mlx-lm reads.

    Entries are added and none is taken away, so that transformers reads the result as before; but
    longrope's factors for short texts stand for the long ones, too
    (:func:`mlx_fd.models.rope_scaling.for_short_texts`).

    Args:
        config: what config.json holds.
        file: where it is from, for messages.
        has_head: whether the weights have a head beside the embedding; ``None``: not known. It
            counts where the configuration does not say whether the embedding is the head.

    Returns:
        A copy. A ``text_config`` stays where it is; infinities, which transformers writes as
        objects, are numbers.

    Raises:
        UserError: mlx-lm does not know the architecture, entries contradict each other, or one
            says what mlx-lm cannot do.
    """
    backend()
    from mlx_lm.utils import _decode_tagged_floats

    translated = _decode_tagged_floats(copy.deepcopy(dict(config)))
    if not isinstance(translated.get("model_type"), str):
        raise UserError(f"{file}: has no model_type; {AGAIN}")
    translated = _wrapped(translated, file)
    args_class = _text_args(translated, file)
    check_quantization(translated, file, args_class.__module__.rpartition(".")[2])
    fields = _field_names(args_class)
    part = language_part(translated)
    if part is not translated:
        _fill_wrapper(translated, part, file)
        if _TIED in fields and part.get(_TIED) is None and translated.get(_TIED) is not None:
            part[_TIED] = translated[_TIED]
    required = _required(args_class)
    answered = _TIED in fields and has_head is not None
    if part.get(_TIED) is None and (answered or _TIED in required):
        part[_TIED] = not has_head
    _translate_names(part, fields, required)
    _complete(part, file)
    _translate_rope(part, fields, file)
    _fill_original_length(part)
    _take_short_factors(part)
    _translate_period(part, fields, file)
    missing = [name for name in required if name not in part]
    if missing:
        raise UserError(
            f"{file}: has no {missing[0]}, which mlx-lm needs for {part.get('model_type')} models; "
            f"{AGAIN}"
        )
    return translated


def has_architecture(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has the architecture of a configuration."""
    try:
        _classes(config, Path(CONFIG))
    except UserError:
        return False
    return True


# ------------------------------------------------------------------------------ mlx-lm's classes


def _classes(config: Mapping[str, Any], file: Path) -> tuple[Any, Any]:
    """mlx-lm's classes of a configuration's architecture: of the model and of its arguments."""
    backend()
    from mlx_lm.utils import _get_classes

    try:
        classes: tuple[Any, Any] = _get_classes(dict(config))
    except (Exception, SystemExit) as error:  # one module of mlx-lm ends the process
        raise UserError(
            f"{file}: mlx-lm has no architecture {config.get('model_type')!r:.80}; use a model of "
            "one that it has"
        ) from error
    return classes


def language_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary in a configuration that describes the language model; maybe all of it."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config  # type: ignore[return-value]


def _wrapped(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """A text model that mlx-lm only has inside its multimodal wrapper, in that wrapper."""
    from mlx_lm.models.base import BaseModelArgs

    name = config["model_type"]
    if not name.endswith("_text"):
        return config
    try:
        _classes(config, file)
    except UserError:
        outer = {**config, "model_type": name.removesuffix("_text"), "text_config": config}
        reader = _classes(outer, file)[1].from_dict
        if reader.__func__ is BaseModelArgs.from_dict.__func__:
            raise  # it would not take weights without the wrapper's names
        return outer
    return config


def _text_args(config: Mapping[str, Any], file: Path) -> Any:
    """mlx-lm's class of arguments of the language model in a configuration.

    Of a wrapper's module it is one that the module has or imports beside its own, which has
    hidden layers; where there are several, the one of the ``model_type`` in ``text_config``.
    """
    from mlx_lm.models.base import BaseModelArgs

    model, own = _classes(config, file)
    part = language_part(config)
    if part is config or "text_config" not in _field_names(own):
        return own
    modules = []
    for parent in (*own.__mro__, *model.__mro__):
        if parent.__module__.startswith("mlx_lm.models."):
            modules.append(importlib.import_module(parent.__module__))
    values = [value for one in modules for value in vars(one).values()]
    classes = [
        getattr(value, "ModelArgs", None) if inspect.ismodule(value) else value for value in values
    ]
    candidates = {
        args: args.__module__
        for args in classes
        if inspect.isclass(args)
        and issubclass(args, BaseModelArgs)
        and "num_hidden_layers" in _field_names(args)
    }
    if not candidates:
        raise UserError(
            f"{file}: mlx-fd does not find the language model in {own.__module__}; use a model of "
            "another architecture"
        )
    # mlx-lm itself takes a llama for all that it does not tell apart.
    for wanted in (_module_of_type(str(part.get("model_type"))), "mlx_lm.models.llama"):
        for args, its_module in candidates.items():
            if its_module == wanted:
                return args
    return next(iter(candidates))


def _text_arguments(config: Mapping[str, Any], file: Path) -> Any:
    """The arguments that mlx-lm makes the language model of."""
    args_class = _text_args(config, file)
    _, own = _classes(config, file)
    if own is args_class:
        return own.from_dict(copy.deepcopy(dict(config)))
    # A wrapper gives its own sizes to the model in it.
    inner = own.from_dict(copy.deepcopy(dict(config))).text_config
    return args_class.from_dict(inner) if isinstance(inner, dict) else inner


def _module_of_type(model_type: str) -> str:
    from mlx_lm.utils import MODEL_REMAPPING

    return f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}"


def _field_names(args_class: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(args_class))


def _required(args_class: Any) -> list[str]:
    """Entries without which a class of arguments cannot be made."""
    from mlx_lm.models.base import BaseModelArgs

    if args_class.from_dict.__func__ is not BaseModelArgs.from_dict.__func__:
        return []
    none = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(args_class)
        if field.init and field.default is none and field.default_factory is none
    ]


def _fill_wrapper(config: dict[str, Any], part: Mapping[str, Any], file: Path) -> None:
    """Give a wrapper what it has a field for and only its language model says, such as sizes."""
    for name in _field_names(_classes(config, file)[1]):
        if config.get(name) is None and part.get(name) is not None:
            config[name] = part[name]


def _translate_names(part: dict[str, Any], fields: Sequence[str], required: Sequence[str]) -> None:
    """Say what transformers 5 names in another way than before, or works out itself."""
    for name, other in _SYNONYMS.items():
        needed = name in required or (name in fields and other not in fields)
        if needed and part.get(name) is None and other in part:
            part[name] = part[other]
    heads, hidden = part.get("num_attention_heads"), part.get("hidden_size")
    if "num_key_value_heads" in required and isinstance(heads, int):
        part.setdefault("num_key_value_heads", heads)
    if "head_dim" in required and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        part.setdefault("head_dim", hidden // heads)
    if "rope_scaling" in required:
        part.setdefault("rope_scaling", None)  # some classes have no default for "none"
    types, names = part.get("layer_types"), _LAYER_NAMES.get(str(part.get("model_type")), {})
    if isinstance(types, list):
        part["layer_types"] = [names.get(kind, kind) for kind in types]


def _complete(part: dict[str, Any], file: Path) -> None:
    """Say what mlx-lm would take for granted otherwise, and refuse what it passes over."""
    name = str(part.get("model_type"))
    for entry, value in _MISSING.get(name, {}).items():
        if part.get(entry) is None:
            part[entry] = value
    for entry, value in _PASSED_OVER.get(name, {}).items():
        if part.get(entry) not in (None, value):
            raise UserError(
                f"{file}: {entry} is {part[entry]!r:.80}, which mlx-lm passes over for {name} "
                "models: it would be another model than the published one; use a model of another "
                "architecture"
            )


# ------------------------------------------------------------------------------------- positions


def _translate_rope(part: dict[str, Any], fields: Sequence[str], file: Path) -> None:
    """Say ``rope_parameters`` in the words that a class of arguments has fields for."""
    published = part.get("rope_parameters")
    if published is not None and not isinstance(published, Mapping):
        raise UserError(f"{file}: rope_parameters is {published!r:.80}, not an object; {AGAIN}")
    by_type = {key: one for key, one in (published or {}).items() if isinstance(one, Mapping)}
    if by_type and "rope_parameters" in fields:
        return
    if by_type:
        _translate_by_type(part, by_type, fields, file)
    elif published:
        _translate_flat(part, published, fields, file)
    scaling = part.get("rope_scaling")
    if isinstance(scaling, dict) and rope_kind(scaling) not in UNSCALED:
        if not {"rope_scaling", "rope_parameters"} & set(fields):
            raise UserError(
                f"{file}: its positions are scaled ({rope_kind(scaling)}), and mlx-lm has no "
                f"scaled positions for {part.get('model_type')} models; use a model of another "
                "architecture"
            )
        # Some classes ask for the one name, some for the other.
        scaling.setdefault("type", rope_kind(scaling))
        scaling.setdefault("rope_type", rope_kind(scaling))


def _fill_original_length(part: dict[str, Any]) -> None:
    """Say from which length positions are scaled, where a file leaves it to transformers.

    mlx-lm would take 4096 or 8192 for it, transformers takes the model's own length.
    """
    rope = part.get("rope_parameters") or {}
    stated = (part.get(_ORIGINAL), rope.get(_ORIGINAL), part.get("max_position_embeddings"))
    length = next((one for one in stated if one is not None), None)
    for one in (part.get("rope_scaling"), rope, *rope.values()):
        if length is None or not isinstance(one, dict) or rope_kind(one) not in _FROM_A_LENGTH:
            continue
        if one.get(_ORIGINAL) is None:
            one[_ORIGINAL] = length


def _take_short_factors(part: dict[str, Any]) -> None:
    """Let longrope's factors for short texts count, which mlx-lm passes over."""
    scaling, rope = part.get("rope_scaling"), part.get("rope_parameters")
    if isinstance(scaling, dict):
        part["rope_scaling"] = for_short_texts(scaling)
    if isinstance(rope, dict):
        made = for_short_texts(rope)
        # What was in their place is kept once, in rope_scaling.
        part["rope_parameters"] = {key: made[key] for key in rope}


def _translate_flat(
    part: dict[str, Any], rope: Mapping[str, Any], fields: Sequence[str], file: Path
) -> None:
    for names, key in ((BASE_FIELDS, "rope_theta"), (PARTIAL_FIELDS, "partial_rotary_factor")):
        field = next((name for name in names if name in fields), None)
        if field is not None and rope.get(key) is not None:
            _set(part, field, rope[key], f"rope_parameters' {key}", file)
    old = part.get("rope_scaling")
    if isinstance(old, Mapping):
        if rope_kind(old) != rope_kind(rope):
            raise UserError(
                f"{file}: rope_scaling is of the type {rope_kind(old)} and rope_parameters of the "
                f"type {rope_kind(rope)}; take out the one that is wrong"
            )
        for key in sorted((old.keys() & rope.keys()) - {"type", "rope_type"}):
            _check_equal(f"rope_scaling's {key}", old[key], "rope_parameters'", rope[key], file)
    if rope_kind(rope) in UNSCALED:
        return
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if part.get(_ORIGINAL) is not None:
        scaling.setdefault(_ORIGINAL, part[_ORIGINAL])
    elif _ORIGINAL in fields and _ORIGINAL in scaling:
        part[_ORIGINAL] = scaling[_ORIGINAL]
    if not old:
        part["rope_scaling"] = scaling


def _translate_by_type(
    part: dict[str, Any],
    by_type: Mapping[str, Mapping[str, Any]],
    fields: Sequence[str],
    file: Path,
) -> None:
    """As for one set of parameters, of the full layers; the others may have a base of their own."""
    full = by_type.get("full_attention") or next(iter(by_type.values()))
    _translate_flat(part, full, fields, file)
    local = next((name for name in LOCAL_BASE_FIELDS if name in fields), None)
    for layer_type, rope in by_type.items():
        if rope is full:
            continue
        base = rope.get("rope_theta")
        same = {key: rope.get(key) == full.get(key) for key in ("rope_theta", PARTIAL_FIELDS[0])}
        if rope_kind(rope) in UNSCALED and local is not None and base is not None:
            _set(part, local, base, f"rope_parameters' rope_theta of {layer_type}", file)
        elif rope_kind(rope) not in UNSCALED or not all(same.values()):
            raise UserError(
                f"{file}: rope_parameters has positions of their own for {layer_type}, and mlx-lm "
                f"has one kind for all layers of {part.get('model_type')} models; use a model of "
                "another architecture"
            )


def _set(part: dict[str, Any], name: str, value: Any, source: str, file: Path) -> None:
    if part.get(name) is not None:
        _check_equal(name, part[name], source, value, file)
    part[name] = value


def _check_equal(name: str, value: Any, other: str, its_value: Any, file: Path) -> None:
    if value != its_value:
        raise UserError(
            f"{file}: {name} is {value!r:.80} and {other} is {its_value!r:.80}; take out the one "
            "that is wrong"
        )


def rope_kind(rope: Mapping[str, Any]) -> str:
    """How positions are scaled, by transformers' name for it."""
    return str(rope.get("type") or rope.get("rope_type") or "default")


# ---------------------------------------------------------------------------- the kinds of layers


def _translate_period(part: dict[str, Any], fields: Sequence[str], file: Path) -> None:
    """Say ``layer_types`` as a period, where a class of arguments has a field only for that."""
    types = part.get("layer_types")
    name = next((name for name in _PERIOD_FIELDS if name in fields), None)
    if name is None or "layer_types" in fields:
        return
    if isinstance(part.get(name), str) or (name in part and part[name] is None):
        return  # exaone4: "LLLG", or all layers are full
    period = part.get(name)
    if isinstance(types, list) and "full_attention" in types:
        found = types.index("full_attention") + 1
        for index, kind in enumerate(types):
            if (kind == "full_attention") != ((index + 1) % found == 0):
                raise UserError(
                    f"{file}: layer {index} in layer_types is {kind!r:.80}, and mlx-lm wants every "
                    f"{found}th layer of {part.get('model_type')} models to be the full one; use "
                    "a model whose layers go by a period"
                )
        if period is None:
            period = found
        elif isinstance(period, int) and period != found and not _same(period, found, len(types)):
            raise UserError(
                f"{file}: {name} is {period} and in layer_types each {found}th layer is the full "
                "one; take out the entry that is wrong"
            )
    if part.get("model_type") == "exaone4":  # the words of the version before
        part[name] = None if period is None else "L" * (period - 1) + "G"
    elif period is not None:
        part[name] = period


def _same(period: int, other: int, layers: int) -> bool:
    """Whether two periods are one, for so few layers."""
    return all((i % period == period - 1) == (i % other == other - 1) for i in range(layers))
