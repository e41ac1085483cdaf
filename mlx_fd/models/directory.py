"""Is a model directory sound? Looked at before mlx-lm, which trusts what it reads.

Whatever a directory holds, it is told in a sentence that names the file, before anything waits,
runs or is allocated. Light: nothing here imports MLX.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
AGAIN = "download or make the model again"
# What somebody may open, by its name; the rest of a directory is nobody's business.
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
_FOLDERS = ("additional_chat_templates", "1_Pooling")
_JSON_OBJECTS = (
    *(CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "hf_quant_config.json"),
    *("model.safetensors.index.json", "sentence_bert_config.json"),
)
# Several times what the largest published models have.
_MAX_TEXT_BYTES = 256 << 20
_MAX_CONFIG_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_LAYERS = 4096
_MAX_COUNT = 1 << 20
_MAX_WIDTH = 1 << 24
# Sizes by the names that they have in config.json. Lists and null stand for other things there.
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "d_model", "n_embd")
_COUNTED = ("layers", "layer", "heads", "head", "experts", "groups", "blocks")
# Even at one bit a weight, a byte holds no more than 8 of them; twice that for what is left out.
_MAX_WEIGHTS_PER_BYTE = 16
_BITS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of a tensor: its shape, and its place after the header."""

    shape: tuple[int, ...]
    begin: int
    end: int


@contextmanager
def blaming(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever foreign code raises on a user's file into a sentence about the file.

    Only around calls into other libraries that do nothing but read that file: there any exception
    means that the file is not what it should be.

    Args:
        what: the sentence up to the reason, as in ``"the model in PATH cannot be loaded"``.
        advice: what to do, behind the reason.

    Raises:
        UserError: instead of any error in the block.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in the tokenizers package is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = " ".join(str(error).split())[:500]
        plain = isinstance(error, OSError | ValueError | RuntimeError) and message
        reason = message if plain else f"{type(error).__name__}: {message}".rstrip(": ")
        raise UserError(f"{what}: {reason}{advice and f'; {advice}'}") from error


def check_directory(path: Path) -> None:
    """Make sure that a model directory can be opened.

    Its files are regular and not absurdly large, what is JSON is a JSON object, config.json has no
    size that its weights cannot have, and the weight files are whole.

    Args:
        path: a directory with config.json and ``model*.safetensors``.

    Raises:
        UserError: the sentence names the file, what is wrong with it, and what to do.
    """
    check_files(path)
    objects = {name: read_object(path / name) for name in _JSON_OBJECTS if (path / name).exists()}
    tensors: dict[str, Path] = {}
    size = 0
    for file in sorted(path.glob("model*.safetensors")):
        for name in read_header(file):
            # mlx-lm reads all of them, in no order, and the last one counts.
            if (other := tensors.setdefault(name, file)) != file:
                raise UserError(
                    f"{file}: has {name}, and so has {other.name}; take away the one that is not "
                    "this model's, or whose weights the other has, too"
                )
        size += file.stat().st_size
        if not tensors:
            raise UserError(f"{file}: holds no weights; {AGAIN}")
    if CONFIG in objects and tensors:
        _check_sizes(path / CONFIG, objects[CONFIG], len(tensors), size)
    if CONFIG in objects:
        _check_origin(path / CONFIG, objects[CONFIG].get("mlx_fd"))
        if (code := objects[CONFIG].get("model_file")) is not None:
            raise UserError(
                f"{path / CONFIG}: the model needs code of its own (model_file: {code!r:.80}), and "
                "code that comes with a model is never run; use a model of an architecture that "
                "mlx-lm has"
            )
    for name in (CONFIG, "generation_config.json"):
        if name in objects:
            _check_end_tokens(path / name, objects[name].get("eos_token_id"))


def check_files(path: Path) -> None:
    """Make sure that what will be opened in a model directory is regular files.

    Links to regular files are: the hub's cache is made of them.

    Raises:
        UserError: a FIFO, socket, device, directory or dead link stands for a file, or a file is
            too large to be what its name says.
    """
    for folder in (path, *(path / name for name in _FOLDERS)):
        if not folder.is_dir():
            continue
        try:
            files = [file for file in folder.iterdir() if file.suffix in _READ]
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
        for file in sorted(files):
            _check_file(file)


def _check_file(file: Path) -> None:
    try:
        info = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; {AGAIN}") from error
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{file}: is not a regular file; take it away, or {AGAIN}")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file}: may not be read by this user; change its permissions")
    if file.suffix == ".safetensors":
        return
    most = _MAX_CONFIG_BYTES if file.name == CONFIG else _MAX_TEXT_BYTES
    if info.st_size > most:
        raise UserError(f"{file}: has {info.st_size} bytes, more than {most}; {AGAIN}")


def check_link(file: Path) -> None:
    """Make sure that a file is its directory's own, before it is copied to where others see it.

    The hub's cache is made of links into its own folder ``blobs``.

    Raises:
        UserError: it is a link that leads elsewhere.
    """
    folder, target = file.parent.resolve(), file.resolve()
    if target.is_relative_to(folder) or _is_of_hub(target, folder):
        return
    raise UserError(
        f"{file}: is a link to {target}, outside of the model's directory, and would be copied; "
        "put the file itself there, or take the link away"
    )


def _is_of_hub(target: Path, folder: Path) -> bool:
    """Whether a file is one that the hub's library has fetched into its cache."""
    from huggingface_hub import constants

    of_folder = folder.parents[1] if folder.parent.name == "snapshots" else None
    blobs = target.parent
    return blobs.name == "blobs" and (
        blobs.parent == of_folder or blobs.parents[1] == Path(constants.HF_HUB_CACHE).resolve()
    )


# --------------------------------------------------------------------------------------------- JSON


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, is not UTF-8, no JSON or no object, is nested too deeply, or
            names a key twice.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{file}: cannot be read: it is nested too deeply; {AGAIN}") from error
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object; {AGAIN}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r} is there twice")
        content[name] = value
    return content


# ---------------------------------------------------------------------------------------- the sizes


def _check_sizes(file: Path, config: Mapping[str, Any], tensors: int, size: int) -> None:
    """Make sure that no size in config.json is one that the weights cannot have."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for name, value in part.items():
            most = _most(name, tensors)
            if most is None or value is None or isinstance(value, list | dict):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{file}: {name} is {value!r:.80}, not a whole number; {AGAIN}")
            if not _least(name) <= value <= most:
                raise UserError(
                    f"{file}: {name} is {value:.6g}, and with these weights it can be "
                    f"{_least(name)} to {most}; {AGAIN}"
                )
        hidden = part.get("hidden_size")
        for name in ("vocab_size", "intermediate_size"):
            other = part.get(name)
            if not (isinstance(hidden, int) and isinstance(other, int)):
                continue
            if hidden * other > _MAX_WEIGHTS_PER_BYTE * size:
                raise UserError(
                    f"{file}: hidden_size {hidden} and {name} {other} are a matrix of "
                    f"{hidden * other:.1e} weights, and the files with the weights have "
                    f"{size} bytes in all; {AGAIN}"
                )


def _check_origin(file: Path, value: Any) -> None:
    """What a pruned model says of where it comes from, where it says something."""
    if value is None:
        return
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, list) or not all(type(one) is int and one >= 0 for one in layers):
        raise UserError(
            f"{file}: its entry mlx_fd is {value!r:.80}, which no pruned model has; take the entry "
            "out, or prune again"
        )


def _most(name: str, tensors: int) -> int | None:
    """The most that an entry of config.json can be; ``None``: it is no size."""
    if name in _WIDTHS:
        return _MAX_WIDTH
    if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        return min(tensors, _MAX_LAYERS)  # each has a weight at least
    if name.startswith(("num_", "n_")) and name.rsplit("_", 1)[-1] in _COUNTED:
        return _MAX_COUNT
    return None


def _least(name: str) -> int:
    """Some counts may be 0: of experts, of layers that share their cache."""
    required = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    return 1 if name in required else 0


def _check_end_tokens(file: Path, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < _MAX_WIDTH for one in ids
    ):
        raise UserError(
            f"{file}: eos_token_id is {value!r:.80}, neither a token's number nor a list of them; "
            f"correct it, or {AGAIN}"
        )


# -------------------------------------------------------------------------------------- the weights


def read_header(file: Path) -> dict[str, Tensor]:
    """What a safetensors file says it holds, checked against its size.

    Raises:
        UserError: the file is cut off or damaged, or has a number format that nobody knows.
    """

    def bad(what: str) -> UserError:
        return UserError(f"{file}: is damaged or incomplete ({what}); {AGAIN}")

    try:
        if not file.is_file():  # opening a FIFO would wait for ever
            raise bad("it is not a regular file")
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise bad("its header goes beyond its end")
            header = handle.read(length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise bad("its header is not a JSON object")
    content.pop("__metadata__", None)
    tensors = {name: _tensor(name, about, bad) for name, about in content.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            raise bad(f"{name} overlaps another tensor, or there is a gap before it")
        end = tensor.end
    if end != size - 8 - length:
        raise bad(f"its tensors take {end} bytes and it has {size - 8 - length}")
    return tensors


def _tensor(name: str, about: Any, bad: Callable[[str], UserError]) -> Tensor:
    try:
        kind, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise bad(f"{name} lacks its dtype, shape or place") from error
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise bad(f"{name} has an impossible shape or place")
    if kind not in _BITS:
        raise bad(f"{name} is of the unknown type {kind!r:.40}")
    if 8 * (end - begin) != _BITS[kind] * math.prod(shape):
        raise bad(f"{name} has {end - begin} bytes, which is not its shape {shape} of {kind}")
    return Tensor(tuple(shape), begin, end)
