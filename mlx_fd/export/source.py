"""What is exported: a run's student, one of its checkpoints, or any model; whole, and checked."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd import runs
from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import ModelRef, adapter_base, locate_model
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.dense import dequantize
from mlx_fd.models.directory import ADAPTER_CONFIG, check_link
from mlx_fd.models.families import FAMILIES, Family
from mlx_fd.models.loading import open_lazily
from mlx_fd.models.published_config import language_part
from mlx_fd.models.resolve import parse_name
from mlx_fd.models.storage import read_json
from mlx_fd.models.student import ADAPTER_WEIGHTS, HEADS, read_arrays, read_trained
from mlx_fd.runs.checked import DIGEST, content_digest
from mlx_fd.runs.records.manifest import Manifest

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

# What a tokenizer needs beside the weights, under the names that transformers knows.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Words in the names of a multimodal model's entries that are none of its language model's.
_NO_TEXT = ("vision", "image", "video", "audio")
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Source:
    """A model that passed every check that needs no forward pass.

    Attributes:
        ref: where its files are.
        name: what to call it.
        base: what to call its language model.
        on_hub: whether the hub has that under this name.
        local: whether that is the name of a directory of this machine, and means nothing elsewhere.
        manifest: the run's manifest, empty for a plain model.
        summary: the run's summary, empty where the run has not ended.
    """

    ref: ModelRef
    name: str
    base: str
    on_hub: bool
    local: bool
    manifest: Manifest | dict[str, Any]
    summary: dict[str, Any]

    @property
    def self_distils(self) -> bool:
        """Whether it is of a run of ``mlx-fd self-distill`` or ``mlx-fd distil``."""
        return self.ref.config is not None and self.ref.config.self_distils


def open_source(
    name: str, adapter: Path | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> Source:
    """Find and check what is to be exported.

    Args:
        name: a run directory, one of its checkpoints, or a model's name.
        adapter: an mlx-lm adapter of that model, or of the model it names if ``name`` is empty.
        template_kwargs: further variables of the chat template, beside the run's.

    Raises:
        UserError: nothing of that name, or its files are damaged: a file ends early, numbers in
            it are not finite, or what would be copied is a link to somewhere else.
    """
    ref = locate_model(name, adapter, template_kwargs)
    for copied in (*TOKENIZER_FILES, GENERATION_CONFIG):
        check_link(ref.model / copied)
    for file in sorted(ref.model.glob("model*.safetensors")):
        _check_file(file)
    if ref.adapter is not None:
        _check_file(ref.adapter / ADAPTER_WEIGHTS)
        base, on_hub, local = base_name(name or adapter_base(ref.adapter))
        return Source(ref, ref.adapter.name, base, on_hub, local, {}, {})
    if ref.run is None or ref.config is None:
        base, on_hub, local = base_name(name)
        return Source(
            ref=ref, name=base, base=base, on_hub=on_hub, local=local, manifest={}, summary={}
        )
    assert ref.checkpoint is not None
    for part in (ADAPTER_WEIGHTS, HEADS):
        _check_file(ref.checkpoint / part)
    _check_adapter_config(ref, ref.config.models)
    return Source(
        ref,
        ref.run.name,
        *base_name(ref.config.models.student),
        runs.read_manifest(ref.run),
        _summary(ref.run / runs.SUMMARY),
    )


def _summary(path: Path) -> dict[str, Any]:
    """A run's summary; empty where there is none.

    Raises:
        UserError: it is not what the run wrote, and a model card must not repeat it.
    """
    summary = read_json(path)
    digest = summary.pop(DIGEST, None)
    if digest is not None and digest != content_digest(summary):
        raise UserError(
            f"{path}: it was changed after it was written; mlx-fd resume "
            f"{shlex.quote(str(path.parent))} makes it again"
        )
    return summary


def base_name(name: str) -> tuple[str, bool, bool]:
    """A model's name without what only this machine knows; is it the hub's, is it a directory's."""
    parsed = parse_name(name)
    path = Path(parsed.base).expanduser()
    local = path.exists()
    repository = ALIASES[parsed.base].repo if parsed.base in ALIASES else parsed.base
    base = path.resolve().name if local else repository or parsed.base
    if parsed.layers is not None:
        return f"{base}:layers={parsed.layers}", False, local
    return base, bool(repository) and not local, local


def _check_file(path: Path) -> None:
    """Make sure that a safetensors file is whole and its numbers are finite.

    Raises:
        UserError: it is not; the message names file and tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Compares what the header promises with the file's size; MLX reads on into nothing.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is damaged or incomplete ({error}); download or make it again"
        ) from error
    read_trained(path)


def family_of(model_type: str, what: str) -> Family:
    """What transformers and llama.cpp make of an architecture of mlx-lm's.

    Args:
        model_type: mlx-lm's name.
        what: what is to be written, for the message.

    Raises:
        UserError: that is not known of this one.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"{what} is written for {', '.join(FAMILIES)} models, and this one is "
            f"{model_type}; --format mlx takes every architecture"
        )
    return FAMILIES[model_type]


def language_model(model: nn.Module, model_type: str) -> tuple[nn.Module, str]:
    """What of a model transformers and llama.cpp have a text model for, and its family's name.

    That is all of it, or what a multimodal model writes with: mlx-lm has it in such a wrapper, with
    the class of the text model. The name may be of no family.

    Args:
        model: as mlx-lm opens it.
        model_type: of its config.json.
    """
    inner: Any = getattr(model, "language_model", None)
    if model_type in FAMILIES or not hasattr(inner, "args"):
        return model, model_type
    # Kimi-VL's text model does not say what it is.
    names = getattr(inner.args, "model_type", ""), type(inner).__module__.rpartition(".")[2]
    return inner, next((name for name in names if name in FAMILIES), model_type)


def open_text(ref: ModelRef, what: str) -> tuple[Any, dict[str, Any], Family]:
    """The text model to be written, its part of the configuration, and its family.

    Weights stay on the disk.

    Args:
        ref: where it is.
        what: what is to be written, for the message.

    Raises:
        UserError: it is of no known family, or cannot be opened.
    """
    whole, config = open_lazily(ref.model)
    model, name = language_model(whole, config["model_type"])
    family = family_of(name, what)
    part = config if model is whole else language_part(config)
    if model is not whole and part is config:  # Qwen2-VL's has no part for the text alone
        part = {k: v for k, v in config.items() if not any(word in k for word in _NO_TEXT)}
    return model, {**part, "model_type": family.name}, family


def fused_text(ref: ModelRef) -> nn.Module:
    """The text model alone, as :func:`fused`."""
    return language_model(fused(ref), read_json(ref.model / "config.json")["model_type"])[0]


def stored_dtype(model: nn.Module) -> mx.Dtype:
    """The type of a model's matrices; of their scales where they are quantised."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    floating = [
        array
        for _, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    matrix: mx.array = max(floating, key=lambda array: array.ndim)
    return matrix.dtype


def fused(ref: ModelRef) -> nn.Module:
    """The language model with its adapter fused into it, in float32 and dense; weights stay lazy.

    Everything is computed in float32, however the base is stored, and rounded once at the end by
    whoever writes it: fused in 16 bits, a small adapter would be rounded away.
    """
    import mlx.core as mx
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters

    model, _ = open_lazily(ref.model)
    model.set_dtype(mx.float32)
    # Before the adapter: fused into a module of floating-point blocks it would become bfloat16.
    dequantize(model)
    if ref.adapter_folder is not None:
        try:
            load_adapters(model, str(ref.adapter_folder))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{ref.adapter_folder}: this adapter does not fit: {error}") from error
    merged = [
        (name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")
    ]
    if merged:
        model.update_modules(tree_unflatten(merged))
    return model


def adapter_config(ref: ModelRef) -> dict[str, Any]:
    """The adapter's configuration as mlx-lm has it.

    Raises:
        UserError: there is no adapter.
    """
    if ref.adapter_folder is None:
        raise UserError(
            "--adapter: this is a plain model, which has no adapter; name a run, or leave "
            "--adapter out"
        )
    return read_json(ref.adapter_folder / ADAPTER_CONFIG)


def _check_adapter_config(ref: ModelRef, options: ModelOptions) -> None:
    """Make sure that mlx-lm puts the adapter on as the run did; a user may edit this file."""
    config, path = adapter_config(ref), f"{ref.checkpoint}/{ADAPTER_CONFIG}"
    lora: dict[str, Any] = {
        "rank": options.lora_rank,
        "scale": options.lora_scale,
        "dropout": options.lora_dropout,
    }
    found = dict(config.get("lora_parameters") or {})
    # Which modules have LoRA is in the file where mlx-lm's own choice is not meant.
    keys = found.pop("keys", None)
    if options.lora_keys:
        lora["keys"], found["keys"] = list(options.lora_keys), keys
    wanted = {"fine_tune_type": options.train, "lora_parameters": lora}
    for key, value in wanted.items():
        given = found if key == "lora_parameters" else config.get(key)
        if given != value:
            raise UserError(f"{path}: {key} is {config.get(key)!r}, and the run had {value!r}")
    if type(config.get("num_layers")) is not int:
        raise UserError(f"{path}: num_layers is {config.get('num_layers')!r}, no whole number")


def changed_modules(ref: ModelRef) -> set[str]:
    """Names of the text model's modules whose weights the training changed."""
    if ref.adapter_folder is None:
        return set()
    weights = read_arrays(ref.adapter_folder / ADAPTER_WEIGHTS)
    return {name.rsplit(".", 1)[0].removeprefix("language_model.") for name in weights}


def end_tokens(tokenizer: Any) -> int | list[int] | None:
    """The ids that end a turn, the tokenizer's own first; as config.json writes them."""
    eos = tokenizer.eos_token_id
    ends = [*([eos] if eos is not None else []), *sorted(tokenizer.eos_token_ids - {eos})]
    return ends[0] if len(ends) == 1 else ends or None


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copy a model's tokenizer and chat template as they are.

    Raises:
        UserError: one of the model's files cannot be read.
    """
    for name in TOKENIZER_FILES:
        copy_file(model / name, folder)


def copy_file(path: Path, folder: Path) -> None:
    """Copy one of a model's files, if it has it.

    Raises:
        UserError: it cannot be read.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    (folder / path.name).write_bytes(content)
